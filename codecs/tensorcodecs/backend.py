"""Which inner loops this process uses: compiled ones where numba is, numpy's where it is not.

The first process on a machine compiles them (about ten seconds, said in the log) into numba's
cache beside the sources or in the user's cache directory; later ones load them in well under half
a second. `MURMURATION_PLAIN_CODECS=1` does without numba.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from types import ModuleType
from typing import Final

log: Final = logging.getLogger("tensorcodecs")


@lru_cache(maxsize=1)
def kernels() -> ModuleType | None:
    """The module of compiled loops, or None where there is no numba."""
    if os.environ.get("MURMURATION_PLAIN_CODECS") == "1":
        return None
    try:
        from tensorcodecs import kernels as compiled
    except ImportError:
        log.info("numba is not installed: codecs run on numpy and zstd, about 20 times slower")
        return None
    return compiled


@lru_cache(maxsize=1)
def sparse_kernels() -> ModuleType | None:
    """Those of the top-k codec, likewise."""
    if kernels() is None:
        return None
    from tensorcodecs import sparse_kernels as compiled

    return compiled
