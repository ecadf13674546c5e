"""Python's garbage collector: off while libraries are imported, and called where a model is done with."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Leave Python's collector off: it takes a sixth of the time that importing torch, transformers and TRL does.

    It goes over all that they make, again and again.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def free_memory() -> None:
    """Give back what models took that nothing refers to any more, to the device too."""
    gc.collect()
    # Not imported here: a process that has not needed it until now has nothing to give back.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
