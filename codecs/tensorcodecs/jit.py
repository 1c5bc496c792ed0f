"""How the compiled loops are compiled: what they have in common.

What Python calls is an `entry`: compiled for one signature when its module is first imported, and
never in the middle of a round; numba keeps the machine code on disk. Everything else is `inner`:
compiled into the entries that use it, without a way in from Python and without a file of its own,
each of which would take as long again.

numba loads scipy.linalg (a fifth of a later process's start) only to see whether it is there, for
products of matrices that nothing here computes; `without_scipy` lets it wait until somebody does.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, Final

from numba import njit, types

_OPTIONS: Final[dict[str, Any]] = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
}


def entry(signature: Any) -> Any:
    """A function for Python to call."""
    return njit([signature], cache=True, **_OPTIONS)


inner: Final[Any] = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)
"""A function for other compiled ones only."""


def readable(kind: Any, ndim: int = 1) -> Any:
    """A contiguous array that is only read, and may be read-only."""
    return types.Array(kind, ndim, "C", readonly=True)


def without_scipy() -> None:
    """Make numba ready to load compiled code, and leave scipy.linalg alone meanwhile.

    `numba.np.arraymath` asks once, when it is imported, whether scipy's BLAS can be. That it is
    installed is what the answer means; each product of matrices asks again when it is compiled.
    """
    if "numba.np.arraymath" in sys.modules or importlib.util.find_spec("scipy") is None:
        return
    from numba.np import linalg

    asked = getattr(linalg, "ensure_blas", None)
    if asked is None:  # another numba: it may ask in another way, and is then only slower
        return
    linalg.ensure_blas = lambda: None
    try:
        from numba.np import arraymath
    finally:
        linalg.ensure_blas = asked
    arraymath.ensure_blas = asked
