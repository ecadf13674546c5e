"""Whether Triton's kernels run here."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch


def missing_for_triton(device: torch.device) -> str | None:
    """Return what keeps Triton's kernels from running on ``device``, and what to do about it; None if nothing does.

    Triton compiles what launches a kernel with the machine's own C compiler and Python's headers, when the kernel is
    first used.
    """
    if device.type != "cuda":
        return f"needs a CUDA device, not {device}"
    if importlib.util.find_spec("triton") is None:
        return "is not installed; install it (pip install triton)"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "finds no C compiler; install gcc, or name one in CC"
    # Where Triton looks: by default Debian's Python names another folder.
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file():
        return "finds no Python.h; install Python's headers (Debian's package python3-dev)"
    return None
