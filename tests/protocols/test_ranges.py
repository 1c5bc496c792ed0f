"""A set of ranges is a set of numbers, held to Python's own sets."""

from __future__ import annotations

import itertools
import random

from protocols.ranges import Ranges


def numbers(ranges: Ranges) -> set[int]:
    return {n for start, stop in ranges for n in range(start, stop)}


def test_every_operation_is_the_one_of_sets_over_thousands_of_seeds() -> None:
    for seed in range(3000):
        rng = random.Random(seed)
        ours, theirs = Ranges(), set[int]()
        for _ in range(rng.randint(1, 30)):
            start = rng.randint(0, 60)
            stop = start + rng.randint(0, 12)
            part = set(range(start, stop))
            if rng.random() < 0.6:
                assert ours.add(start, stop) == len(part - theirs), f"seed {seed}"
                theirs |= part
            else:
                assert ours.remove(start, stop) == len(part & theirs), f"seed {seed}"
                theirs -= part
            pieces = list(ours)
            assert all(a < b for a, b in pieces), f"seed {seed}"
            assert all(x[1] < y[0] for x, y in itertools.pairwise(pieces)), seed
        assert numbers(ours) == theirs, f"seed {seed}"
        assert (len(ours), ours.pieces, bool(ours)) == (len(theirs), len(list(ours)), bool(theirs))
        start = rng.randint(0, 60)
        stop = start + rng.randint(0, 20)
        span = set(range(start, stop))
        assert numbers(Ranges(ours.within(start, stop))) == theirs & span
        assert numbers(Ranges(ours.missing(start, stop))) == span - theirs
        assert all((n in ours) == (n in theirs) for n in range(80))
        assert ours.top == max(theirs, default=-1) + 1
        other = Ranges((a, a + rng.randint(0, 9)) for a in rng.sample(range(60), 5))
        assert numbers(ours | other) == theirs | numbers(other)
        assert numbers(ours & other) == theirs & numbers(other)
        assert numbers(ours - other) == theirs - numbers(other)
        assert ours.copy() == ours
