"""Keeps the garbage collector away from imports: it would search what stays until the end, again and again."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_uncollected() -> Iterator[None]:
    """Collect nothing while the block imports, and leave what is alive at its end out of later rounds.

    Modules are some 100,000 objects, and searching them takes a fifth of the imports of a service or worker; what they
    drop in cycles stays, up to 8 MB.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
