"""Which inner loops this process uses: compiled ones where numba is, numpy's where it is not.

The first process on a machine compiles them (about twelve seconds, said in the log) into numba's
cache beside the sources or in the user's cache directory; later ones load them in well under half
a second. `MURMURATION_PLAIN_CODECS=1` does without numba.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Final

log: Final = logging.getLogger("tensorcodecs")

_SLOW_S: Final = 1.5  # loading takes less, compiling more
COMPILING: Final = "compiling the codec for this machine, once; that takes about twelve seconds"


@lru_cache(maxsize=1)
def kernels() -> ModuleType | None:
    """The module of compiled loops, or None where there is no numba."""
    if os.environ.get("MURMURATION_PLAIN_CODECS") == "1":
        return None
    with _saying_so(log.info):
        try:
            from tensorcodecs.jit import without_scipy

            without_scipy()
            from tensorcodecs import kernels as compiled
        except ImportError:
            log.info("numba is not installed: codecs run on numpy and zstd, about 20 times slower")
            return None
    return compiled


@contextmanager
def _saying_so(say: Callable[[str], object]) -> Iterator[None]:
    """`say` that something is being compiled, if the block takes that long."""
    said = threading.Timer(_SLOW_S, say, [COMPILING])
    said.daemon = True
    said.start()
    try:
        yield
    finally:
        said.cancel()


def warm_up(say: Callable[[str], object] = log.info) -> None:
    """Load the compiled loops now rather than when the first tensor comes; `say` if that means
    compiling them. Safe in any thread; a later call returns at once."""
    with _saying_so(say):
        kernels()


@lru_cache(maxsize=1)
def sparse_kernels() -> ModuleType | None:
    """Those of the top-k codec, likewise."""
    if kernels() is None:
        return None
    with _saying_so(log.info):
        from tensorcodecs import sparse_kernels as compiled
    return compiled
