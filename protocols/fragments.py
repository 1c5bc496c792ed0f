"""Which units a round exchanges: all of them, or one of P fragments in turn (arXiv 2501.18512).

A fragment is a contiguous range of units, and round r exchanges fragment r mod P, so every unit is
exchanged once in P rounds, and a round carries about a P-th of the bytes. It is a function of the
round's number and the manifest alone: nobody has to be told. (Streaming DiLoCo strides its
fragments through the layers; here a span is a range of units, so they are ranges of the layout's
canonical order instead.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, slots=True)
class Fragments:
    """How a layout is cut; see the module."""

    edges: tuple[int, ...]
    """0, the first units of the second fragment and so on, and the number of units."""

    def __post_init__(self) -> None:
        rising = all(start < stop for start, stop in pairwise(self.edges))
        if len(self.edges) < 2 or self.edges[0] != 0 or not rising:
            raise ValueError(f"fragments at {self.edges}: each needs a unit at least")

    @classmethod
    def cut(cls, sizes: Sequence[int], count: int) -> Fragments:
        """`count` fragments of units with these sizes, each as near to its share as they allow.

        Raises:
            ValueError: more fragments than units, or none.
        """
        if not 1 <= count <= len(sizes):
            raise ValueError(f"{count} fragments of {len(sizes)} units")
        sums = [0, *accumulate(sizes)]
        edges = [0]
        for index in range(1, count):
            goal = sums[-1] * index  # times count, to stay in whole numbers
            low, high = edges[-1] + 1, len(sizes) - (count - index)
            edges.append(min(range(low, high + 1), key=lambda u: abs(sums[u] * count - goal)))
        return cls((*edges, len(sizes)))

    @property
    def count(self) -> int:
        """P."""
        return len(self.edges) - 1

    @property
    def units(self) -> int:
        return self.edges[-1]

    def of(self, number: int) -> range:
        """The units that round `number` exchanges."""
        index = number % self.count
        return range(self.edges[index], self.edges[index + 1])
