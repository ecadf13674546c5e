"""How many CPU cores there are to share."""

import os


def available_cores() -> int:
    """Return how many CPU cores this process may use; where the system does not tell (macOS), all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
