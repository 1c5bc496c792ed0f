"""Groups that average, and groups that mix: the product's arithmetic without its network.

A group's members hold `PretrainMethod`s. They freeze their work, the product's reducer averages
what arrives, and everybody applies it; whose contribution was lost keeps the work and sends it with
the next. Every `every` rounds, each counting its own, every group begins a mix of each of its slots
with another group drawn at random, as in `protocols/gossip.py`: who is still busy with one in that
slot lends nothing, and up to three others are asked. The state is lent, compared and coded by the
product's `UnitMixer`, and both groups hold d in the same bytes, so that one adds what the other
subtracts and the sum of both stays what it was, however coarse the codec. Like in the network, d
rides back with averages: with the borrower's next one, and with the lender's after that.

Shapes: N = parameters, S = vectors of the state, U = values of a unit.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from peer.train.composite import Mix, compose
from peer.train.method import ArrayMap
from peer.train.mixing import TooFarError
from peer.train.pretrain import PretrainMethod
from protocols.gossip import GROUPS_DRAWN

Float32 = npt.NDArray[np.float32]

SLOTS: Final = 8
"""The default run's `aggregators_max`; never more than there are units."""


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

    def unit(self, number: int) -> Float32:
        """The outer state of a unit (S, U): a copy."""
        return self.members[0].outer(number, number + 1)[0]

    def mix(self, unit: int, payload: bytes, mix: int, sign: int) -> None:
        """Add sign * d to everybody's outer state, as an outcome does that holds nothing else.
        `mix`: its number, from 1.
        """
        outcome = [b""] * self.members[0].units
        outcome[unit] = compose(b"", [Mix(mix, mix, sign, payload)])
        for member in self.members:
            member.apply(outcome, np.zeros(member.units, np.bool_))


@dataclass(frozen=True, slots=True)
class Difference:
    """Half of what keeps two groups apart in one slot, as both of them decode it."""

    payloads: Mapping[int, bytes]
    """By unit."""
    coded_bytes: int
    lent_bytes: int
    hints: tuple[float, ...]

    @classmethod
    def between(
        cls, ours: Group, theirs: Group, units: range, hints: Sequence[float]
    ) -> Difference:
        """What `ours` must move by, and `theirs` the other way, to meet. `hints`: of the slot's
        last mix in `ours`, if there was one (`peer.mixing`).
        """
        payloads, ratios, lent_bytes = {}, [], 0
        mixer = ours.members[0].mixer()
        for unit in units:
            our_SU, their_SU = ours.unit(unit), theirs.unit(unit)
            lent = mixer.lend(their_SU, hints)
            lent_bytes += len(lent)
            try:
                found = mixer.difference(unit, our_SU, lent)
            except TooFarError:  # it asks again
                lent = mixer.lend(their_SU, hints, exact=True)
                lent_bytes += len(lent)
                found = mixer.difference(unit, our_SU, lent)
            payloads[unit] = found.payload
            ratios.append(found.ratios)
        coded_bytes = sum(map(len, payloads.values()))
        worst = tuple(np.max(np.array(ratios), axis=0).tolist())
        return cls(payloads, coded_bytes, lent_bytes, worst)


@dataclass(frozen=True, slots=True)
class _Ride:
    """A difference on its way into a group's average."""

    round_: int
    group: int
    slot: int
    mix: int
    difference: Difference
    sign: int


class Gossip:
    """Who mixes with whom when, and what is on its way."""

    def __init__(
        self,
        groups: Sequence[Group],
        rng: random.Random,
        *,
        every: int,
        rides: tuple[int, int] = (1, 2),
    ) -> None:
        """`every`: a group's rounds between two mixes of a slot that it begins; `rides`: rounds
        until a mix has arrived at its borrower and at its lender.
        """
        units = groups[0].members[0].units
        count = min(SLOTS, units)
        self._slots = [range(units * s // count, units * (s + 1) // count) for s in range(count)]
        self._groups = groups
        self._rng = rng
        self._every = every
        self._rides = rides
        # Groups are of different age: their rounds have different numbers.
        self._begun = [rng.randrange(every) if every else 0 for _ in groups]
        self._riding: list[_Ride] = []
        self._hints: dict[tuple[int, int], tuple[float, ...]] = {}
        self.mixes = 0
        self.bytes = 0
        """Between groups, so far."""

    def after(self, round_: int, rounds: int) -> None:
        """Round `round_` of 1..`rounds` was applied everywhere: what is due arrives, and whose turn
        it is begin a mix. One that could not arrive in time is not begun.
        """
        for ride in (ride for ride in self._riding if ride.round_ == round_):
            for unit, payload in ride.difference.payloads.items():
                self._groups[ride.group].mix(unit, payload, ride.mix, ride.sign)
        self._riding = [ride for ride in self._riding if ride.round_ > round_]
        if round_ + max(self._rides) > rounds:
            return
        order = list(range(len(self._groups)))
        self._rng.shuffle(order)
        for group in order:
            for slot in range(len(self._slots)):
                if (round_ + self._begun[group]) % self._every == slot % self._every:
                    self._begin(round_, group, slot)

    def _begin(self, round_: int, group: int, slot: int) -> None:
        busy = {ride.group for ride in self._riding if ride.slot == slot}
        others = [other for other in range(len(self._groups)) if other != group]
        drawn = self._rng.sample(others, min(GROUPS_DRAWN, len(others)))
        lender = next((other for other in drawn if other not in busy), None)
        if lender is not None and group not in busy:
            self._meet(round_, group, lender, slot)

    def _meet(self, round_: int, borrower: int, lender: int, slot: int) -> None:
        difference = Difference.between(
            self._groups[borrower], self._groups[lender], self._slots[slot],
            self._hints.get((borrower, slot), ()),
        )  # fmt: skip
        self._hints[borrower, slot] = difference.hints
        self.mixes += 1
        # The loan one way; d, when it is paid, the other.
        self.bytes += difference.lent_bytes + difference.coded_bytes
        for group, ride, sign in (
            (borrower, self._rides[0], 1),
            (lender, self._rides[1], -1),
        ):
            self._riding.append(_Ride(round_ + ride, group, slot, self.mixes, difference, sign))


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
