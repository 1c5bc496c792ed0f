"""Training without a model: numbers that add up, and a memory of whose work is where.

A unit of the state is a few float64 values, a contribution is a vector made from who did it and
when, and every coded unit names the contributions inside. So a simulation can ask what no real run
can: is the mean exactly that of the contributors in its proof, was any work applied twice, whose
work is inside? On the wire a unit weighs what a real one would.

Shape suffixes: U = units, D = values in a unit.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from peer.driver import AppliedFacts, Taken
from peer.exchange import BYTES, UNITS, Outcome, included_units
from peer.simulate.loop import VirtualLoop
from peer.train.method import ArrayMap
from peer.transfer import Snapshot, TensorNote, describe
from protocols.messages import Plan
from protocols.types import Digest, PeerId
from tensorcodecs import Reduced

Values = npt.NDArray[np.float64]

WIDTH: Final = 2  # values in a unit
STATES_KEPT: Final = 4096  # the latest, of all groups
CONTRIBUTIONS_KEPT: Final = 64  # per peer; rounds further back can't be caught up with
_HEAD: Final = struct.Struct(f"<IdI{WIDTH}d")  # checksum, weight, contributions inside, values
_WHO: Final = struct.Struct("<II")  # machine, its contribution's number


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


class SimReducer:
    """`method.Reducer`: the weighted mean, in the senders' order."""

    def __init__(self, charge: Callable[[float], None], unit_s: float) -> None:
        """`charge`: told how long the codec thread works; `unit_s`: on one unit."""
        self._charge = charge
        self._unit_s = unit_s

    def check(self, unit: int, payload: bytes) -> None:
        self._charge(self._unit_s)
        if len(read_unit(payload).inside) != 1:
            raise ValueError("a contribution has one author")

    def reduce(self, unit: int, parts: Sequence[tuple[float, bytes]]) -> Reduced:
        self._charge(self._unit_s * len(parts))
        total = sum(weight for weight, _ in parts)
        if total <= 0:
            return Reduced(b"", ())
        sums = [0.0] * WIDTH
        inside: list[tuple[int, int]] = []
        for weight, payload in parts:
            part = read_unit(payload)
            inside += part.inside
            for i, value in enumerate(part.values):
                sums[i] += weight * value
        mean = Unit(total, tuple(inside), tuple(s / total for s in sums))
        return Reduced(mean.coded(), ())


@dataclass(eq=False)
class History:
    """An outer state: what was applied so far. Shared by all peers that stand there."""

    round: int
    digest: Digest
    theta_UD: Values
    works: dict[int, tuple[int, ...]]
    """Machine -> per unit the numbers of its works inside, as bits."""


@dataclass(eq=False, slots=True)
class Work:
    """What one peer learned between two contributions, and the units that have yet to take it."""

    number: int
    tokens: float
    delta_UD: Values
    open_U: npt.NDArray[np.bool_]


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

    def __init__(self, units: int) -> None:
        self.units = units
        self.contributions: dict[int, dict[int, SimContribution]] = {}
        """Machine -> number -> contribution; the latest `CONTRIBUTIONS_KEPT`."""
        self._states: WeakValueDictionary[bytes, History] = WeakValueDictionary()
        self._recent: deque[History] = deque(maxlen=STATES_KEPT)
        """A state may be on its way when everybody has moved on."""
        zero = np.zeros((units, WIDTH))
        self.origin = History(0, Digest(hashlib.sha256(b"origin").digest()), zero, {})
        self._states[self.origin.digest] = self.origin

    def note(self, contribution: SimContribution) -> None:
        mine = self.contributions.setdefault(contribution.author, {})
        mine[contribution.number] = contribution
        mine.pop(contribution.number - CONTRIBUTIONS_KEPT, None)

    def find(self, digest: bytes) -> History | None:
        return self._states.get(digest)

    def after(self, state: History, outcomes: Sequence[Outcome]) -> History:
        """The state after a round: computed once for all peers that apply it."""
        total = hashlib.sha256(state.digest)
        for outcome in outcomes:
            total.update(outcome.header.content)
        digest = Digest(total.digest())
        known = self._states.get(digest)
        if known is not None:
            return known
        theta_UD = state.theta_UD.copy()
        works = {who: list(bits) for who, bits in state.works.items()}
        for outcome in outcomes:
            for u, payload in enumerate(outcome.units, outcome.header.start):
                if not payload:
                    continue
                unit = read_unit(payload)
                theta_UD[u] -= unit.values
                for author, number in unit.inside:
                    made = self.contributions.get(author, {}).get(number)
                    if made is not None:
                        bits = works.setdefault(author, [0] * self.units)
                        bits[u] |= made.works[u]
        frozen = {who: tuple(bits) for who, bits in works.items()}
        new = History(state.round + 1, digest, theta_UD, frozen)
        self._states[digest] = new
        self._recent.append(new)
        return new


@dataclass(frozen=True, kw_only=True)
class Load:
    """What training costs on one machine, and what a real run's data would weigh."""

    tokens_per_s: float = 1000.0
    step_s: float = 1.0
    """An inner step; the training thread serves the network between two of them."""
    freeze_s: float = 0.02
    """Training stands still for so long to freeze a contribution ..."""
    apply_s: float = 0.05
    """... and to apply a round."""
    unit_s: float = 0.0
    """For the codec thread to encode, check or reduce one unit."""
    disk_s: float = 0.05
    """Until a round is in the journal."""
    unit_bytes: int = 64_000
    """A coded unit on the wire."""
    state_bytes: int = 4_000_000
    """A whole state on the wire."""


def wire_bytes(load: Load, units: int) -> Callable[[int, bytes], int]:
    """How many bytes a frame stands for: `SimNetwork`'s question."""
    scale = load.state_bytes / (units * WIDTH * 8 + 32)

    def size(kind: int, payload: bytes) -> int:
        if kind == UNITS:
            at = count = 0
            while at + 8 <= len(payload):
                length = int.from_bytes(payload[at + 4 : at + 8], "little")
                count += length > 0
                at += 8 + length
            return count * load.unit_bytes + 8
        if kind == BYTES:
            return int(len(payload) * scale)
        return len(payload)

    return size


@dataclass
class Disk:
    """What a restart finds."""

    state: History | None = None
    works: int = 0
    contributions: int = 0
    """Numbers already given, which no restart gives again."""


@dataclass
class Ticker:
    """The training thread's day, in seconds of the loop."""

    trained_s: float = 0.0
    until_s: float = 0.0
    """`trained_s` counts up to then, which is the end of a step under way."""
    served_s: float = 0.0
    resume_s: float = 0.0
    """When it last went on training."""
    started: bool = False


class SimLearner:
    """`driver.Learner`: trains in virtual time, and keeps what is not yet in anybody's mean."""

    def __init__(
        self,
        machine: int,
        me: PeerId,
        load: Load,
        books: Books,
        disk: Disk,
        loop: VirtualLoop,
        applied: Callable[[int, Sequence[Outcome], Plan | None, History, History], None],
    ) -> None:
        """`applied(number, outcomes, plan, before, after)`: the judge looks on."""
        self.load_ = load
        self.state = disk.state or books.origin
        self.restored = disk.state is not None
        self.ticker = Ticker(resume_s=loop.time())
        self.tensors: tuple[TensorNote, ...] = describe(_arrays(self.state))
        self._machine = machine
        self._me = me
        self._books = books
        self._disk = disk
        self._loop = loop
        self._applied = applied
        self._open: list[Work] = []
        self._frozen: set[int] = set()
        """Works that are in the last contribution."""
        self._taken_s = 0.0
        """`ticker.trained_s` at the last contribution."""

    @property
    def round(self) -> int:
        return self.state.round

    @property
    def digest(self) -> Digest:
        return self.state.digest

    def start(self) -> None:
        if not self.ticker.started:
            self.ticker.started = True
            self.ticker.resume_s = self._loop.time()

    def froze(self, seconds: float) -> None:
        """The whole machine stood still for so long."""
        self.ticker.resume_s += seconds

    def trained_s(self) -> float:
        """Seconds of training so far."""
        ticker = self.ticker
        now_s = self._loop.time()
        running_s = max(0.0, now_s - ticker.resume_s) if ticker.started else 0.0
        return ticker.trained_s - max(0.0, ticker.until_s - now_s) + running_s

    async def _between_steps(self, seconds: float) -> None:
        """Have the training thread do something else for so long, after its current step."""
        ticker, now_s = self.ticker, self._loop.time()
        begin_s = max(now_s, ticker.resume_s)
        if ticker.started and now_s > ticker.resume_s:
            step_s = self.load_.step_s
            steps = -((ticker.resume_s - now_s) // step_s)  # rounded up
            begin_s = max(now_s, ticker.resume_s + steps * step_s)
            ticker.trained_s += begin_s - ticker.resume_s
            ticker.until_s = begin_s
        ticker.served_s += seconds
        ticker.resume_s = begin_s + seconds
        await asyncio.sleep(ticker.resume_s - now_s)

    # ── the interface ────────────────────────────────────────────────────────────────────
    async def take(self, number: int) -> Taken:
        await self._between_steps(self.load_.freeze_s)
        seconds = self.ticker.trained_s - self._taken_s
        self._taken_s = self.ticker.trained_s
        if seconds > 0:
            self._disk.works += 1
            units = self._books.units
            delta_UD = _delta(self._machine, self._disk.works, units)
            tokens = round(seconds * self.load_.tokens_per_s, 3)
            work = Work(self._disk.works, tokens, delta_UD, np.ones(units, np.bool_))
            self._open.append(work)
        contribution = self._contribution()
        self._frozen = {work.number for work in self._open}
        return Taken(contribution, 0.0, int(seconds / self.load_.step_s), [])

    def _contribution(self) -> SimContribution:
        units = self._books.units
        delta_UD = np.zeros((units, WIDTH))
        works = [0] * units
        for work in self._open:
            delta_UD[work.open_U] += work.delta_UD[work.open_U]
            for u in np.flatnonzero(work.open_U).tolist():
                works[u] |= 1 << work.number
        weight = sum(work.tokens for work in self._open)
        self._disk.contributions += 1
        made = SimContribution(
            self._machine, self._disk.contributions, weight, delta_UD, tuple(works),
            self._loop.charge, self.load_.unit_s,
        )  # fmt: skip
        if weight > 0:
            self._books.note(made)
        return made

    async def apply(
        self, number: int, outcomes: list[Outcome], plan: Plan | None
    ) -> AppliedFacts | None:
        before = self.state
        await self._between_steps(self.load_.apply_s)
        if self.state is not before or number != before.round:
            return None
        after = self._books.after(before, outcomes)
        self._applied(number, outcomes, plan, before, after)
        self.state = after
        mine_U = included_units(outcomes, self._me)
        for work in self._open:
            if work.number in self._frozen:
                work.open_U &= ~mine_U
        self._open = [work for work in self._open if work.open_U.any()]
        await asyncio.sleep(self.load_.disk_s)
        if self.state is after:
            self._disk.state = after
        return AppliedFacts(after.digest, float(mine_U.mean()) if len(mine_U) else 0.0)

    async def snapshot(self) -> Snapshot:
        await self._between_steps(self.load_.freeze_s)
        return Snapshot(self.state.round, self.state.digest, _arrays(self.state))

    async def load(self, state: Snapshot, step_back: bool, parted: int | None = None) -> bool:
        """Own history is not kept here (`parted`): the books follow each step's work, and work that
        both halves did would count twice in them."""
        await self._between_steps(self.load_.apply_s)
        if state.round < self.round and not step_back:
            return False
        known = self._books.find(state.arrays["digest"].tobytes())
        if known is None or known.digest != state.digest or known.round != state.round:
            return False
        if not np.array_equal(known.theta_UD, state.arrays["theta"]):
            return False
        self.state = self._disk.state = known
        self._open.clear()
        self._frozen.clear()
        self._taken_s = self.ticker.trained_s
        return True


def _arrays(state: History) -> ArrayMap:
    digest = np.frombuffer(state.digest, np.uint8)
    return {"digest": digest, "theta": state.theta_UD}


def _delta(machine: int, number: int, units: int) -> Values:
    """A vector that says whose work it is: the same everywhere, unlike anybody else's."""
    seeds = np.arange(units * WIDTH, dtype=np.uint64).reshape(units, WIDTH)
    seeds = seeds * np.uint64(0x9E3779B97F4A7C15)
    seeds ^= np.uint64((machine + 1) * 0xBF58476D1CE4E5B9 % 2**64)
    seeds += np.uint64(number * 0x94D049BB133111EB % 2**64)
    seeds ^= seeds >> np.uint64(31)
    seeds *= np.uint64(0xD6E8FEB86659FD93)
    return (seeds >> np.uint64(11)).astype(np.float64) / 2**53 - 0.5
