"""A frame's header, compiled: written, and checked together with its checksum (see `frame`)."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tensorcodecs.checksum_kernels import checksum
from tensorcodecs.frame import CHECKED, COMPILED_FROM, HEADER, MAGIC, VERSION
from tensorcodecs.jit import inner
from tensorcodecs.vector import load64, store64

_U: Final = np.uint64
_HEADER: Final = HEADER.size
_FIRST: Final = np.uint64(int.from_bytes(MAGIC + bytes([VERSION]), "little"))
_LOW: Final = np.uint64(2**32 - 1)


@inner
def write_header(
    out: Any, head: int, end: int, kind: int, table: int, numel: int, parameter: int, sums: Any
) -> None:
    """Make out[head:end], COMPILED_FROM bytes or more, a frame. `kind`: codec, mode and bits."""
    fields = _U(kind) | _U(table) << _U(24) | _U(numel) << _U(32)
    store64(out, _U(head + 8), fields)
    store64(out, _U(head + 16), _U(parameter) | _U(end - head - _HEADER) << _U(32))
    total = _U(checksum(out, head + CHECKED, end, sums))
    store64(out, _U(head), _FIRST | total << _U(32))


@inner
def intact_fields(
    data: Any, start: int, stop: int, kind: int, mask: int, numel: int, sums: Any
) -> Any:
    """The fields (codec, mode, bits, table) of an intact frame of `numel` values, which are `kind`
    where `mask` has bits; -1 if data[start:stop] is none or short."""
    size = stop - start
    if start < 0 or stop > data.size or size < COMPILED_FROM:
        return np.int64(-1)
    first = load64(data, _U(start))
    fields = load64(data, _U(start + 8))
    rest = load64(data, _U(start + 16))
    if (
        (first & _LOW) != _FIRST
        or (fields & _U(mask)) != _U(kind)
        or (fields >> _U(32)) != _U(numel)
        or (rest >> _U(32)) != _U(size - _HEADER)
        or (first >> _U(32)) != _U(checksum(data, start + CHECKED, stop, sums))
    ):
        return np.int64(-1)
    return np.int64(fields & _LOW)
