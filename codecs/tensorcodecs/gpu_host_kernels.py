"""What the GPU codec's host compiles: headers and checksums of many frames without the GIL."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import types

from tensorcodecs.frame import COMPILED_FROM
from tensorcodecs.header_kernels import intact_fields, write_header
from tensorcodecs.jit import entry, readable

_CODEC: Final = 255  # the mask of a header's first field

_U8, _I64, _BOOL = types.uint8, types.int64, types.boolean


@entry(
    types.void(
        readable(_U8), readable(_I64), readable(_I64), readable(_I64), _I64, _BOOL[::1]
    )
)  # fmt: skip
def check_frames(
    data: Any, start_U: Any, stop_U: Any, numel_U: Any, codec: int, good_U: Any
) -> None:
    """Which data[start:stop] are intact frames of `codec` with so many values. The short are not
    looked at, and count as bad."""
    sums = np.empty(8, np.uint64)
    for unit in range(start_U.size):
        fields = intact_fields(
            data, start_U[unit], stop_U[unit], codec, _CODEC, numel_U[unit], sums
        )
        good_U[unit] = fields >= 0


@entry(
    types.void(
        _U8[::1], readable(_I64), readable(_I64), readable(_I64), _I64, _I64, _I64
    )
)  # fmt: skip
def seal_frames(
    data: Any, start_U: Any, stop_U: Any, table_U: Any, kind: int, numel: int, parameter: int
) -> None:
    """Write the header of each frame data[start:stop] that is not too short for `checksum`."""
    sums = np.empty(8, np.uint64)
    for unit in range(start_U.size):
        if stop_U[unit] - start_U[unit] >= COMPILED_FROM:
            write_header(
                data, start_U[unit], stop_U[unit], kind, table_U[unit], numel, parameter, sums
            )
