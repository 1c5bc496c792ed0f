"""Which mixes with other groups are in a state: what makes each of them count once.

The table is part of the outer state, of one shape, so it travels with checkpoints, journals and
downloads, and two states with the same digest remember the same. For each unit it has rows of (id,
until), some for what was added (sign 1) and more for what was taken away (sign -1), and for either
sign one more row, (0, floor). A mix counts if its id is in no row and its `until`, the last round
whose outcome may contain it, lies above the floor. When all rows of a sign are taken the one with
the smallest `until` gives way and the floor rises to it: what has been forgotten can't come again,
it is refused. So memory is bounded and "at most once" holds without any clock.

Shape: (units, rows, 2) uint64; about a kilobyte for a unit of 384 KiB.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from protocols import limits

UInt64 = npt.NDArray[np.uint64]

_ADDED: Final = slice(0, limits.MIX_ROWS_ADDED)
_TAKEN: Final = slice(limits.MIX_ROWS_ADDED, limits.MIX_ROWS_ADDED + limits.MIX_ROWS_TAKEN)
_ROWS: Final = slice(0, _TAKEN.stop)
_SHAPE: Final = (_TAKEN.stop + 2, 2)


class MixTable:
    """See the module."""

    def __init__(self, units: int) -> None:
        self.array: UInt64 = np.zeros((units, *_SHAPE), np.uint64)

    def copy(self, units: slice = slice(None)) -> MixTable:
        """Of some units, which are numbered from 0 then."""
        twin = MixTable(0)
        twin.array = self.array[units].copy()
        return twin

    def admits(self, unit: int, mix: int, until: int, sign: int) -> bool:
        """Whether the mix may still count in this unit."""
        _, floor = _place(sign)
        return until > int(self.array[unit, floor, 1]) and not self.has(unit, mix)

    def has(self, unit: int, mix: int) -> bool:
        return bool((self.array[unit, _ROWS, 0] == mix).any())

    def add(self, unit: int, mix: int, until: int, sign: int) -> None:
        """Remember an admitted mix."""
        where, floor = _place(sign)
        rows, bottom = self.array[unit, where], self.array[unit, floor]
        row = int(np.argmin(rows[:, 1]))  # a free one has 0
        bottom[1] = max(int(bottom[1]), int(rows[row, 1]))
        rows[row] = mix, until

    def mask(self, mix: int, start: int, stop: int) -> int:
        """The units of start..stop-1 whose state has the mix; bit i is unit start + i."""
        return _bits((self.array[start:stop, _ROWS, 0] == mix).any(axis=1))

    def forgotten(self, until: int, sign: int, start: int, stop: int) -> int:
        """Those that would not know any more: such a mix can't come in, but may be in."""
        _, floor = _place(sign)
        return _bits(self.array[start:stop, floor, 1] >= until)

    def load(self, array: npt.NDArray[np.generic]) -> None:
        """Take another state's table.

        Raises:
            ValueError: its shape or type is another.
        """
        if array.shape != self.array.shape or array.dtype != self.array.dtype:
            raise ValueError(f"mixes: {array.dtype} {array.shape}, not {self.array.shape}")
        self.array[:] = array


def _place(sign: int) -> tuple[slice, int]:
    """(rows, row of the floor)."""
    return (_ADDED, _TAKEN.stop) if sign > 0 else (_TAKEN, _TAKEN.stop + 1)


def _bits(flags: npt.NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")
