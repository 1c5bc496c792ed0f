"""Training without a model: numbers that add up, and a memory of whose work is where.

A contribution is a vector made from who did it and when, and every coded unit names the
contributions inside (`books`). On the wire a unit weighs what a real one would.

Shape suffixes: U = units, D = values in a unit.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from peer.driver import AppliedFacts, Taken
from peer.exchange import BYTES, UNITS, Outcome
from peer.own_work import OwnWork
from peer.simulate.books import (
    LENT,
    NEAR,
    WIDTH,
    Books,
    History,
    SimContribution,
    Unit,
    Values,
    arrays_of,
    coded_mass,
    grid_of,
    read_mass,
    read_unit,
)
from peer.simulate.loop import VirtualLoop
from peer.train.mixing import Difference
from peer.train.mixtable import MixTable
from peer.train.shared import SharedStream
from peer.transfer import Snapshot
from protocols.blocks import NO_BLOCKS
from protocols.events import Remembered
from protocols.fragments import Fragments
from protocols.ledger import Counted, Ledger, entries_of
from protocols.messages import Plan
from protocols.schema import SchemaError
from protocols.sharding import Shares
from protocols.types import Digest, PeerId, RunId
from tensorcodecs import Reduced
from tensorcodecs.nearby import TooFarError

SAMPLE_TOKENS: Final = 500.0
BLOCK_SAMPLES: Final = 4
FAR_ONE_IN: Final = 8  # differences that are multiples of it


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

    def check_sum(self, unit: int, payload: bytes) -> None:
        self._charge(self._unit_s)
        if not read_unit(payload).inside:
            raise ValueError("a sum of nothing")

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


class SimMixer:
    """`mixing.Mixer` of whole numbers: what one side adds the other takes away, to the last digit.

    One lender in so many is too far away from the borrower, and has to show itself exactly.
    """

    def lend(
        self, state_SU: npt.NDArray[Any], hints: Sequence[float], *, exact: bool = False
    ) -> bytes:
        return coded_mass(int(state_SU[0]), LENT if exact else NEAR)

    def difference(self, unit: int, ours_SU: npt.NDArray[Any], lent: bytes) -> Difference:
        exact = lent[:4] == LENT
        gap = read_mass(lent, LENT if exact else NEAR) - int(ours_SU[0])
        if not exact and gap % FAR_ONE_IN == 0 and gap:
            raise TooFarError("as far as it pretends to be")
        return Difference(coded_mass(gap // 2), (1.0,))

    def check(self, unit: int, payload: bytes) -> None:
        read_mass(payload)


@dataclass(eq=False, slots=True)
class Work:
    """What one peer learned between two contributions, and the units that have yet to take it."""

    number: int
    tokens: float
    delta_UD: Values
    open_U: npt.NDArray[np.bool_]


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
            at, count = 0, 0.0
            while at + 8 <= len(payload):
                length = int.from_bytes(payload[at + 4 : at + 8], "little")
                count += _weighs(payload[at + 8 : at + 8 + length])
                at += 8 + length
            return int(count * load.unit_bytes) + 8
        if kind == BYTES:
            return int(len(payload) * scale)
        return len(payload)

    return size


def _weighs(unit: bytes) -> float:
    """How many means of one unit it stands for: a mix has parameters and momentum, coded alike."""
    match unit[:4]:
        case b"":
            return 0.0
        case b"MIX1":
            return float(unit[4:8] != bytes(4)) + 2.0 * unit[8]
        case b"HALF":
            return 2.0
        case b"NEAR" | b"LENT":
            return 5.0  # two vectors in eight bits and their steps, where a mean has some three
    return 1.0


class _Data:
    """Blocks of samples that are numbers, as the product's streams take them: a `DataSource`."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def block(self, index: int, epoch: int) -> list[Any]:
        return [(epoch, index)] * BLOCK_SAMPLES

    def validation(self) -> list[Any]:
        return []


class SimStream(SharedStream):
    """The product's stream over them."""

    def __init__(self, run: RunId, me: PeerId, blocks: int, fragments: Fragments) -> None:
        super().__init__(_Data(blocks), run, me, fragments, batch_size=1)
        self._handed = 0

    def hand_out(self, total: int) -> list[tuple[int, int]]:
        """Samples up to the `total`-th of this life: the (epoch, block) of each."""
        found: list[Any] = []
        while self._handed < total:
            self._handed += 1
            found += self.next_rows()
        return found


@dataclass
class Disk:
    """What a restart finds."""

    state: History | None = None
    works: int = 0
    ledger: bytes = b""
    """At that state."""
    past: Remembered | None = None
    """... and of its group, then."""
    past_s: float = 0.0
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
        fragments: Fragments,
        stream: SimStream | None = None,
        counted: Callable[[History, Counted, Ledger], None] = lambda *_: None,
    ) -> None:
        """`applied(number, outcomes, plan, before, after)` and, where a ledger of blocks is kept
        (`stream`), `counted(after, what changed, all of it)`: the judge looks on. `fragments`: of
        the books' units."""
        self._fragments = fragments
        self.load_ = load
        self.state = disk.state or books.origin
        self.restored = disk.state is not None
        self.ticker = Ticker(resume_s=loop.time())
        self.grid = grid_of(self.state)
        self._machine = machine
        self._me = me
        self._books = books
        self._disk = disk
        self._loop = loop
        self._applied = applied
        self.mix_table = MixTable(0)
        self.mix_table.array = self.state.mixes
        self.stream = stream
        self.departed: Callable[[], tuple[PeerId, ...]] = tuple
        self._counted = counted
        self._used: dict[tuple[int, int], int] = {}
        """Samples of which (epoch, block) are in the work since the last contribution."""
        if stream is not None and disk.ledger:
            stream.adopt(disk.ledger)
        self._open: list[Work] = []
        self._own_work = OwnWork()
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
        self._train()
        seconds = self.ticker.trained_s - self._taken_s
        self._taken_s = self.ticker.trained_s
        if seconds > 0:
            self._disk.works += 1
            units = self._books.units
            delta_UD = _delta(self._machine, self._disk.works, units)
            tokens = round(seconds * self.load_.tokens_per_s, 3)
            work = Work(self._disk.works, tokens, delta_UD, np.ones(units, np.bool_))
            self._open.append(work)
            self._books.samples.setdefault(self._machine, {})[work.number] = self._used
            self._used = {}
        contribution = self._contribution(self._fragments.of(number))
        self._frozen = {work.number for work in self._open}
        steps = int(seconds / self.load_.step_s)
        if self.stream is None:
            self._own_work.froze(number, contribution.weight, NO_BLOCKS)
            return Taken(contribution, 0.0, steps, [])
        self.stream.heard_goodbye(self.departed())
        blocks = self.stream.drain_used()
        if contribution.weight <= 0:
            self.stream.drop()
        report = self.stream.report(number)
        self._own_work.froze(number, contribution.weight, report)
        return Taken(contribution, 0.0, steps, blocks, report)

    def _contribution(self, exchanged: range) -> SimContribution:
        units = self._books.units
        delta_UD = np.zeros((units, WIDTH))
        works = [0] * units
        for work in self._open:
            delta_UD[work.open_U] += work.delta_UD[work.open_U]
            for u in np.flatnonzero(work.open_U).tolist():
                works[u] |= 1 << work.number
        turn = slice(exchanged.start, exchanged.stop)
        weight = sum(work.tokens for work in self._open if work.open_U[turn].any())
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
        self._train()
        after = self._books.after(before, outcomes)
        self._applied(number, outcomes, plan, before, after)
        self._stand_at(after)
        mine_U = self._own_work.inside(number, outcomes, self._me)
        turn = self._fragments.of(number)
        for work in self._open:
            if work.number in self._frozen:
                work.open_U[turn.start : turn.stop] &= ~mine_U
        self._open = [work for work in self._open if work.open_U.any()]
        counted, ledger = self._account(number, outcomes, after)
        await asyncio.sleep(self.load_.disk_s)
        if self.state is after:
            self._disk.state, self._disk.ledger = after, ledger
        included = float(mine_U.mean()) if len(mine_U) else 0.0
        return AppliedFacts(after.digest, included, counted)

    # ── the data ─────────────────────────────────────────────────────────────────────────
    def _train(self) -> None:
        """Hand out the samples of the steps until now; nothing else has moved since the last."""
        if self.stream is not None:
            total = int(self.ticker.trained_s * self.load_.tokens_per_s / SAMPLE_TOKENS)
            for block in self.stream.hand_out(total):
                self._used[block] = self._used.get(block, 0) + 1

    def _account(
        self, number: int, outcomes: Sequence[Outcome], after: History
    ) -> tuple[Counted | None, bytes]:
        if self.stream is None:
            return None, b""
        counted = self.stream.apply(number, entries_of(outcome.header for outcome in outcomes))
        self._counted(after, counted, self.stream.work.ledger)
        return counted, self.stream.ledger()

    async def share(self, shares: Shares) -> None:
        """Whose part of the run's blocks is whose, from now on."""
        if self.stream is not None:
            await self._between_steps(0.0)
            self._train()
            self.stream.share(shares)

    async def finish(self) -> int:
        """Stop training for good; the next contributions say so. Blocks still in flight."""
        await self._between_steps(0.0)
        self._train()
        self.ticker.started = False
        if self.stream is None:
            return 0
        self.stream.leave()
        return len(self.stream.work.in_flight)

    # ── states ───────────────────────────────────────────────────────────────────────────

    async def snapshot(self) -> Snapshot:
        await self._between_steps(self.load_.freeze_s)
        arrays = arrays_of(self.state)
        if self.stream is None:
            return Snapshot(self.state.round, self.state.digest, arrays)
        self._train()
        ledger, at_work = self.stream.ledger(), self.stream.at_work()
        return Snapshot(self.state.round, self.state.digest, arrays, ledger, at_work)

    async def load(self, state: Snapshot, step_back: bool, parted: int | None = None) -> bool:
        """Own history is not kept here (`parted`): the books follow each step's work, and work that
        both halves did would count twice in them."""
        await self._between_steps(self.load_.apply_s)
        if state.round < self.round and not step_back:
            return False
        known = self._books.find(state.arrays["name"].tobytes())
        if known is None or known.digest != state.digest or known.round != state.round:
            return False
        if not np.array_equal(known.theta_UD, state.arrays["theta"]):
            return False
        self._train()
        self._stand_at(known)
        self._disk.state, self._disk.ledger = known, state.ledger
        if self.stream is not None:
            with contextlib.suppress(SchemaError):  # as the product: it goes on with its own
                self.stream.adopt(state.ledger, state.at_work)
            self.stream.drop()
            self._used.clear()
        self._open.clear()
        self._frozen.clear()
        self._own_work.forget()
        self._taken_s = self.ticker.trained_s
        return True

    async def after_load(self) -> None:
        """A state is on this disk as soon as it is here."""

    def _stand_at(self, state: History) -> None:
        self.state = state
        self.mix_table.array = state.mixes

    def outer(self, start: int, stop: int) -> list[npt.NDArray[Any]]:
        """See `mixing.MixingLearner`: the masses of units start..stop-1."""
        return [self.state.mass_U[unit : unit + 1] for unit in range(start, stop)]


def _delta(machine: int, number: int, units: int) -> Values:
    """A vector that says whose work it is: the same everywhere, unlike anybody else's."""
    seeds = np.arange(units * WIDTH, dtype=np.uint64).reshape(units, WIDTH)
    seeds = seeds * np.uint64(0x9E3779B97F4A7C15)
    seeds ^= np.uint64((machine + 1) * 0xBF58476D1CE4E5B9 % 2**64)
    seeds += np.uint64(number * 0x94D049BB133111EB % 2**64)
    seeds ^= seeds >> np.uint64(31)
    seeds *= np.uint64(0xD6E8FEB86659FD93)
    return (seeds >> np.uint64(11)).astype(np.float64) / 2**53 - 0.5
