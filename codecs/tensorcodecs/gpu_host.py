"""The host's half of the GPU codec: copies, headers and checksums, on as many threads as pay.

One thread moves and checks 10 GB of coded bytes a second at best, which is less than a card codes.
Without numba there is one thread, and Python: `frame` does what is left undone here.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from tensorcodecs.backend import kernels
from tensorcodecs.frame import Bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorcodecs.frame import Payload

Int64 = npt.NDArray[np.int64]

_THREADS_MAX: Final = 8  # a socket's memory is busy with fewer
_PART_MIN: Final = 32  # frames; 1 MB: below, a thread costs more than it saves


def receive(
    payloads: Sequence[Payload], room: Bytes, numel_U: Int64, codec: int
) -> tuple[Int64, npt.NDArray[np.bool_]]:
    """Copy the payloads to `room` one after another.

    Returns where each ends, and which were found to be intact frames of `codec` with so many
    values; the others are either not, or unusual, or not looked at.
    """
    stop_U = np.cumsum([len(payload) for payload in payloads], dtype=np.int64)
    start_U = stop_U - np.array([len(payload) for payload in payloads], np.int64)
    good_U = np.zeros(len(payloads), np.bool_)
    compiled = kernels() is not None

    def work(first: int, stop: int) -> None:
        part = slice(first, stop)
        for payload, at in zip(payloads[part], start_U[part].tolist(), strict=True):
            room[at : at + len(payload)] = np.frombuffer(payload, np.uint8)
        if compiled:
            from tensorcodecs.gpu_host_kernels import check_frames

            check_frames(room, start_U[part], stop_U[part], numel_U[part], codec, good_U[part])

    _spread(work, len(payloads))
    return stop_U, good_U


def seal_all(
    room: Bytes, start_U: Int64, stop_U: Int64, table_U: Int64, kind: int, numel: int,
    parameter: int,
) -> bool:  # fmt: skip
    """Write headers of frames whose bodies are there; not of those below COMPILED_FROM bytes.
    Returns whether that is done: not without numba.

    `kind`: codec, mode and bits, as they follow each other in a header.
    """
    if kernels() is None:
        return False
    from tensorcodecs.gpu_host_kernels import seal_frames

    def work(first: int, stop: int) -> None:
        part = slice(first, stop)
        seal_frames(room, start_U[part], stop_U[part], table_U[part], kind, numel, parameter)

    _spread(work, len(start_U))
    return True


def _spread(work: Callable[[int, int], None], units: int) -> None:
    """work(first, stop) for parts of `units`, at once."""
    threads = min(_THREADS_MAX, os.cpu_count() or 1, units // _PART_MIN)
    if threads < 2:
        work(0, units)
        return
    bounds = [units * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads, thread_name_prefix="tensorcodecs") as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))
