"""What all simulated peers did: the states that there were, and whose work and which mixes are in.

A unit of the state is a few float64 values, moved by the means of contributions, and one whole
number, its *mass*: means move it too, each in its own way, and mixes between groups by exactly
what both sides agreed on. So a simulation can ask what no real run can: is the mean exactly that of
the contributors in its proof, was any work applied twice, does every mix count on both sides?

Shape suffixes: U = units, D = values in a unit.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from peer.exchange import Outcome
from peer.state_chunks import StateGrid
from peer.train.composite import Mix, split
from peer.train.mixtable import MixTable
from protocols.loans import MixId
from protocols.types import Digest
from tensorcodecs import DecodeError

Values = npt.NDArray[np.float64]
Masses = npt.NDArray[np.int64]

WIDTH: Final = 2  # values in a unit
STATES_KEPT: Final = 4096  # the latest, of all groups
CHUNKS: Final = 8  # of a state, so that several donors can give it
CONTRIBUTIONS_KEPT: Final = 64  # per peer; rounds further back can't be caught up with
_HEAD: Final = struct.Struct(f"<IdI{WIDTH}d")  # checksum, weight, contributions inside, values
_WHO: Final = struct.Struct("<II")  # machine, its contribution's number
_D: Final = struct.Struct("<4sqI")  # what it is, the number, checksum
_HALF: Final = b"HALF"
NEAR: Final = b"NEAR"
LENT: Final = b"LENT"


@dataclass(frozen=True, slots=True)
class Unit:
    """A coded unit, read: a mean, its weight and the contributions inside."""

    weight: float
    inside: tuple[tuple[int, int], ...]
    values: tuple[float, ...]

    def coded(self) -> bytes:
        body = _HEAD.pack(0, self.weight, len(self.inside), *self.values)[4:]
        body += b"".join(_WHO.pack(*who) for who in self.inside)
        return zlib.crc32(body).to_bytes(4, "little") + body


def read_unit(payload: bytes) -> Unit:
    """Raises ValueError: it is no coded unit, or was damaged."""
    if len(payload) < _HEAD.size or (len(payload) - _HEAD.size) % _WHO.size:
        raise ValueError("not the length of a unit")
    checksum, weight, count, *values = _HEAD.unpack_from(payload)
    if zlib.crc32(payload[4:]) != checksum or len(payload) != _HEAD.size + count * _WHO.size:
        raise ValueError("wrong checksum")
    return Unit(weight, tuple(_WHO.iter_unpack(payload[_HEAD.size :])), tuple(values))


def coded_mass(value: int, kind: bytes = _HALF) -> bytes:
    """A whole number on the wire: d of a mix, or the mass that a lender shows (`NEAR`, `LENT`)."""
    return _D.pack(kind, value, zlib.crc32(b"%d" % value))


def read_mass(payload: bytes, kind: bytes = _HALF) -> int:
    """Raises DecodeError: it is none, or was damaged."""
    if len(payload) != _D.size:
        raise DecodeError("not the length of a whole number")
    said, value, checksum = _D.unpack(payload)
    if said != kind or checksum != zlib.crc32(b"%d" % value):
        raise DecodeError("not the number that it should be")
    return int(value)


@dataclass(eq=False)
class History:
    """An outer state: what was applied so far. Shared by all peers that stand there."""

    round: int
    name: bytes
    """Of this history: SHA-256 over its rounds' outcomes."""
    theta_UD: Values
    works: dict[int, tuple[int, ...]]
    """Machine -> per unit the numbers of its works inside, as bits."""
    mass_U: Masses
    mixes: npt.NDArray[np.uint64]
    """Of the product's table of mixes; nobody changes it."""
    mixed: dict[MixId, tuple[int, int]]
    """Mix -> (sign, the units that have it as bits): as the table should say, and never forgets."""
    twice: tuple[tuple[MixId, int], ...] = ()
    """(mix, unit) that its round applied although it was inside."""

    @cached_property
    def digest(self) -> Digest:
        """As a real state's, over what of it travels."""
        arrays = arrays_of(self)
        grid = grid_of(self)
        return grid.digest(grid.leaves(arrays))


@dataclass(frozen=True, eq=False)
class SimContribution:
    """`method.Contribution`: the sum of a peer's open works."""

    author: int
    number: int
    weight: float
    delta_UD: Values
    works: tuple[int, ...]
    """Per unit the numbers of the works inside, as bits."""
    charge: Callable[[float], None]
    unit_s: float
    snr_db: tuple[float, float] | None = None

    def encode(self, start: int, stop: int, codec: str | None = None) -> list[bytes]:
        self.charge(self.unit_s * (stop - start))
        who = ((self.author, self.number),)
        rows = self.delta_UD[start:stop].tolist()
        return [Unit(self.weight, who, tuple(row)).coded() for row in rows]


class Books:
    """What all simulated peers did: the judge's memory, which none of them can see."""

    def __init__(self, units: int, *, gossip: bool = False) -> None:
        """`gossip`: whether mixes may ride in units."""
        self.units = units
        self.gossip = gossip
        self.contributions: dict[int, dict[int, SimContribution]] = {}
        """Machine -> number -> contribution; the latest `CONTRIBUTIONS_KEPT`."""
        self.samples: dict[int, dict[int, dict[tuple[int, int], int]]] = {}
        """Machine -> number of its work -> (epoch, block) -> how many of its samples."""
        self._states: WeakValueDictionary[bytes, History] = WeakValueDictionary()
        self._recent: deque[History] = deque(maxlen=STATES_KEPT)
        """A state may be on its way when everybody has moved on."""
        self.origin = History(
            0,
            hashlib.sha256(b"origin").digest(),
            np.zeros((units, WIDTH)),
            {},
            np.zeros(units, np.int64),
            MixTable(units).array,
            {},
        )
        self._states[self.origin.name] = self.origin

    def note(self, contribution: SimContribution) -> None:
        mine = self.contributions.setdefault(contribution.author, {})
        mine[contribution.number] = contribution
        mine.pop(contribution.number - CONTRIBUTIONS_KEPT, None)

    def holds(self, state: History, machine: int, block: tuple[int, int]) -> int:
        """How many samples of an (epoch, block) the work of `machine` has in every unit.

        A block that was trained again, because the first work was thrown away when it was inside
        in part, may be in some units by one of its works and in the others by the other.
        """
        works = self.samples.get(machine, {})
        having = [(number, used[block]) for number, used in works.items() if block in used]
        return min(
            sum(count for number, count in having if bits >> number & 1)
            for bits in state.works.get(machine, (0,))
        )

    def find(self, name: bytes) -> History | None:
        return self._states.get(name)

    def parts(self, payload: bytes) -> tuple[bytes, tuple[Mix, ...]]:
        """(mean, mixes) of a unit as every peer applies it."""
        if not self.gossip:
            return payload, ()
        try:
            return split(payload)
        except DecodeError:
            return b"", ()

    def after(self, state: History, outcomes: Sequence[Outcome]) -> History:
        """The state after a round: computed once for all peers that apply it."""
        total = hashlib.sha256(state.name)
        for outcome in outcomes:
            total.update(outcome.header.content)
        name = total.digest()
        known = self._states.get(name)
        if known is not None:
            return known
        theta_UD, mass_U = state.theta_UD.copy(), state.mass_U.copy()
        works = {who: list(bits) for who, bits in state.works.items()}
        riding: list[tuple[int, Mix]] = []
        for outcome in outcomes:
            for u, payload in enumerate(outcome.units, outcome.header.start):
                mean, mixes = self.parts(payload)
                riding += [(u, mix) for mix in mixes]
                if not mean:
                    continue
                unit = read_unit(mean)
                theta_UD[u] -= unit.values
                mass_U[u] += push_of(mean)
                for author, number in unit.inside:
                    made = self.contributions.get(author, {}).get(number)
                    if made is not None:
                        bits = works.setdefault(author, [0] * self.units)
                        bits[u] |= made.works[u]
        frozen = {who: tuple(bits) for who, bits in works.items()}
        new = History(state.round + 1, name, theta_UD, frozen, mass_U, state.mixes, state.mixed)
        _mix(state, new, riding)
        self._states[name] = new
        self._recent.append(new)
        return new


def push_of(mean: bytes) -> int:
    """By how much a mean moves the mass: so that groups have something to mix."""
    return int.from_bytes(mean[:4], "little") - 2**31


def _mix(before: History, state: History, riding: Iterable[tuple[int, Mix]]) -> None:
    """Apply mixes to the mass of a new state, as `FlatMethod` does: what the table admits."""
    table = MixTable(0)
    table.array = before.mixes
    for unit, mix in riding:
        try:
            d = read_mass(mix.payload)
        except DecodeError:
            continue
        if not table.admits(unit, mix.id, mix.until, mix.sign):
            continue
        if table.array is before.mixes:
            table.array, state.mixed = before.mixes.copy(), dict(before.mixed)
        table.add(unit, mix.id, mix.until, mix.sign)
        state.mass_U[unit] += mix.sign * d
        inside = state.mixed.get(mix.id, (0, 0))[1]
        if inside >> unit & 1:
            state.twice += ((mix.id, unit),)
        state.mixed[mix.id] = (mix.sign, inside | 1 << unit)
    state.mixes = table.array


def arrays_of(state: History) -> dict[str, npt.NDArray[Any]]:
    """A state as it travels: the numbers, and what finds the rest of it again."""
    return {"name": np.frombuffer(state.name, np.uint8), "theta": state.theta_UD}


def grid_of(state: History) -> StateGrid:
    """The same for all states of a simulation."""
    return StateGrid(arrays_of(state), chunk_bytes=max(8, state.theta_UD.nbytes // CHUNKS))
