"""Groups that average, and pairs of groups that mix: the product's arithmetic without its network.

A group's members hold `PretrainMethod`s. They freeze their work, the product's reducer averages
what arrives, and everybody applies it; whose contribution was lost keeps the work and sends it with
the next. Every `every` rounds groups meet in random pairs: one borrows the other's outer parameters
and momentum and codes

    d^ = codec(1/2 (theirs - ours))

which both then hold in the same bytes, so that one adds what the other subtracts and the sum of
both stays what it was, however coarse the codec. Like in the network, d^ rides back with averages:
with the borrower's next one, and with the lender's after that.

Shapes: N = parameters.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from peer.train.method import ArrayMap
from peer.train.pretrain import PretrainMethod
from tensorcodecs import Codec

Float32 = npt.NDArray[np.float32]

LENT_BYTES_PER_VALUE: Final = 1
"""What is lent is coded for somebody who holds something near: a step count modulo 2^8."""


class Group:
    """Peers whose outer states are the same."""

    def __init__(self, members: Sequence[PretrainMethod]) -> None:
        self.members = tuple(members)
        self._reducer = members[0].reducer()

    def average(self, lost: frozenset[int] = frozenset()) -> int:
        """One round. `lost`: members whose contribution never arrives.

        Returns the bytes of one coded mean.
        """
        works = [member.contribution() for member in self.members]
        units = self.members[0].units
        arrived = [
            (work.weight, work.encode(0, units))
            for number, work in enumerate(works)
            if number not in lost and work.weight > 0
        ]
        outcome = []
        for unit in range(units):
            parts = [(weight, frames[unit]) for weight, frames in arrived]
            outcome.append(self._reducer.reduce(unit, parts).payload if parts else b"")
        for number, member in enumerate(self.members):
            member.apply(outcome, np.full(units, number not in lost))
        return sum(map(len, outcome))

    def state(self) -> ArrayMap:
        """The outer state that all members share: copies."""
        return self.members[0].state()

    def shift(self, by: Mapping[str, Float32], sign: int) -> None:
        """Add sign * `by` to everybody's outer state; local work moves along."""
        for member in self.members:
            for name, shift_N in by.items():
                member._outer[name] += np.float32(sign) * shift_N
            member.inner.shift(slice(None), np.float32(sign) * by["theta"])


@dataclass(frozen=True, slots=True)
class Difference:
    """Half of what keeps two groups apart, as both of them decode it."""

    values: Mapping[str, Float32]
    """(N,) each, by the names of the outer state."""
    coded_bytes: int
    lent_bytes: int

    @classmethod
    def between(cls, ours: ArrayMap, theirs: ArrayMap, codec: Codec) -> Difference:
        """What `ours` must move by, and `theirs` the other way, to meet."""
        values = {}
        coded = 0
        for name, our_N in ours.items():
            frames = codec.encode_many(np.float32(0.5) * (theirs[name] - our_N))
            values[name] = np.empty_like(our_N)
            codec.decode_many(frames, values[name])
            coded += sum(map(len, frames))
        lent = sum(len(our_N) for our_N in ours.values()) * LENT_BYTES_PER_VALUE
        return cls(values, coded, lent)


@dataclass(frozen=True, slots=True)
class _Ride:
    """A difference on its way into a group's average."""

    round_: int
    group: int
    difference: Difference
    sign: int


class Gossip:
    """Who mixes with whom when, and what is on its way."""

    def __init__(
        self,
        groups: Sequence[Group],
        codec: Codec,
        rng: random.Random,
        *,
        every: int,
        rides: tuple[int, int] = (1, 2),
    ) -> None:
        """`every`: rounds between two mixes; `rides`: rounds until a mix has arrived at its
        borrower and at its lender.
        """
        self._groups = groups
        self._codec = codec
        self._rng = rng
        self._every = every
        self._rides = rides
        self._riding: list[_Ride] = []
        self.mixes = 0
        self.bytes = 0
        """Between groups, so far."""

    def after(self, round_: int, rounds: int) -> None:
        """Round `round_` of 1..`rounds` was applied everywhere: what is due arrives, and if it is
        time, random pairs meet. A mix that could not arrive in time is not begun.
        """
        for ride in (ride for ride in self._riding if ride.round_ == round_):
            self._groups[ride.group].shift(ride.difference.values, ride.sign)
        self._riding = [ride for ride in self._riding if ride.round_ > round_]
        if round_ % self._every == 0 and round_ + max(self._rides) <= rounds:
            for borrower, lender in pairs(len(self._groups), self._rng):
                self._meet(round_, borrower, lender)

    def _meet(self, round_: int, borrower: int, lender: int) -> None:
        states = self._groups[borrower].state(), self._groups[lender].state()
        difference = Difference.between(*states, self._codec)
        self.mixes += 1
        self.bytes += difference.lent_bytes + difference.coded_bytes
        for group, ride, sign in (
            (borrower, self._rides[0], 1),
            (lender, self._rides[1], -1),
        ):
            self._riding.append(_Ride(round_ + ride, group, difference, sign))


def pairs(groups: int, rng: random.Random) -> list[tuple[int, int]]:
    """A random matching: every group once, but for one that is left over if they are odd."""
    order = list(range(groups))
    rng.shuffle(order)
    return list(zip(order[::2], order[1::2], strict=False))


def apart(groups: Sequence[Group]) -> float:
    """Root mean square distance of the groups' parameters from their mean, relative to it."""
    thetas = np.stack([group.state()["theta"] for group in groups]).astype(np.float64)
    mean_N = thetas.mean(axis=0)
    distances = np.linalg.norm(thetas - mean_N, axis=1)
    return float(np.sqrt(np.mean(distances**2)) / np.linalg.norm(mean_N))


@dataclass(frozen=True, slots=True)
class Crossing:
    """How many vectors' worth of bytes cross between sites when all peers average one vector."""

    peers: int
    sites: int

    @property
    def ring(self) -> int:
        """Sites sum up inside first; a ring among sites then moves 2 (S - 1) vectors in all. Less
        is not possible for an all-reduce, so this is what the best of all rivals would send.
        """
        return 2 * (self.sites - 1)

    @property
    def aggregators(self) -> float:
        """Every peer aggregates its share: each sends the others theirs, and gets the means."""
        return 2 * self.peers * (1 - 1 / self.sites)
