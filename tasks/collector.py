"""Python's garbage collector while libraries are imported: it goes over all that they make, again and again."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Leave Python's collector off: it takes a sixth of the time that importing torch, transformers and TRL does."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
