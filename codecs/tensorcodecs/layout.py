"""The canonical flat order of named tensors, and the fixed grid of units it is cut into.

Every peer of a run must agree on which value sits where in the flat vector, whatever its GPUs,
sharding or module order. So the order is by name (UTF-8 bytes), never by how a model lists its
parameters, and the vector is cut every `CHUNK_VALUES` values, across tensor borders. Two peers
agree exactly when their digests do.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import numpy.typing as npt

CHUNK_VALUES: Final = 98304
"""Values in one unit (the last may be shorter): 384 KiB of float32, which a core's cache holds.
A multiple of 3, 4 and 6 times 256: levels packed by threes, fours or sixes come out even."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each named tensor lies in the flat vector. Make one with `Layout.of`."""

    names: tuple[str, ...]
    """In canonical order."""
    shapes: tuple[tuple[int, ...], ...]
    """Of `names`, in the same order; () is a scalar."""
    offsets: tuple[int, ...]
    """Flat index of each tensor's first value; tensors are contiguous, in C order."""
    numel: int
    """Values in the whole vector."""

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Sequence[int]]]) -> Self:
        """The layout of (name, shape) pairs given in any order.

        Raises:
            ValueError: a name is empty or given twice, or a dimension is negative.
        """
        ordered = sorted(
            ((name, tuple(int(size) for size in shape)) for name, shape in tensors),
            key=lambda item: item[0].encode(),
        )
        offsets = []
        numel = 0
        previous = ""
        for name, shape in ordered:
            if name == previous:
                raise ValueError(f"tensor {name!r} is given twice" if name else "a name is empty")
            if any(size < 0 for size in shape):
                raise ValueError(f"tensor {name!r} has a negative dimension: {shape}")
            offsets.append(numel)
            numel += math.prod(shape)
            previous = name
        names = tuple(name for name, _ in ordered)
        return cls(names, tuple(shape for _, shape in ordered), tuple(offsets), numel)

    @property
    def units(self) -> int:
        """How many units the vector is cut into: ceil(numel / CHUNK_VALUES)."""
        return -(-self.numel // CHUNK_VALUES)

    def unit_slice(self, unit: int) -> slice:
        """The values of `unit` in the flat vector.

        Raises:
            ValueError: there is no such unit.
        """
        if not 0 <= unit < self.units:
            raise ValueError(f"unit {unit} is outside 0..{self.units - 1}")
        start = unit * CHUNK_VALUES
        return slice(start, min(start + CHUNK_VALUES, self.numel))

    def unit_sizes(self, start: int = 0, stop: int | None = None) -> list[int]:
        """How many values units start..stop-1 have (all units by default)."""
        slices = map(self.unit_slice, range(start, self.units if stop is None else stop))
        return [piece.stop - piece.start for piece in slices]

    def name_at(self, offset: int) -> str:
        """The tensor that owns the value at flat index `offset`.

        Raises:
            ValueError: the vector has no such value.
        """
        if not 0 <= offset < self.numel:
            raise ValueError(f"offset {offset} is outside 0..{self.numel - 1}")
        # The last tensor that starts at or before it; empty tensors come before their neighbour.
        return self.names[bisect_right(self.offsets, offset) - 1]

    def views(self, flat: npt.NDArray[np.generic]) -> dict[str, npt.NDArray[np.generic]]:
        """Each tensor as a shaped view into `flat` (numel,): no copies, writes go through.

        Raises:
            ValueError: `flat` has another length, or is not contiguous.
        """
        if flat.shape != (self.numel,) or not flat.flags.c_contiguous:
            raise ValueError(f"need a contiguous vector of {self.numel} values, got {flat.shape}")
        return {
            name: flat[offset : offset + math.prod(shape)].reshape(shape)
            for name, shape, offset in zip(self.names, self.shapes, self.offsets, strict=True)
        }

    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of the order, the shapes and the grid."""
        tensors = [[name, shape] for name, shape in zip(self.names, self.shapes, strict=True)]
        text = json.dumps(["tensorcodecs.layout", 1, CHUNK_VALUES, tensors], separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).digest()
