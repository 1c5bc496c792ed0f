"""Peers that train on blocks, crash, leave and come back, and an all-seeing account of it.

The real `Worklist` and `Ledger` of every peer; a contribution is symbolic: per unit the set of
(peer, life, ordinal) in a member's local work that no outcome has taken into that unit yet, just
as `FlatMethod` keeps differences. So the world knows what a block's work really came to.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from protocols.blocks import BlockReport, from_wire
from protocols.fragments import Fragments
from protocols.ledger import Entry, Ledger
from protocols.ledger_state import pack_ledger, unpack_ledger
from protocols.sharding import Shares
from protocols.types import GroupName, PeerId, RunId
from protocols.worklist import Worklist

RUN = RunId("ab" * 32)


@dataclass
class Member:
    work: Worklist
    speed: float
    life: int
    local: dict[int, set[int]] = field(default_factory=dict)
    """Unit -> ordinals that were trained wholly and are not inside this unit."""
    frozen: dict[int, set[int]] = field(default_factory=dict)
    report: BlockReport = field(default_factory=BlockReport)


class LedgerWorld:
    """One group. `step` is a round."""

    def __init__(
        self, seed: int, *, blocks: int, units: int = 4, loss: float = 0.0, part: float = 0.0,
        fragments: int = 1,
    ) -> None:  # fmt: skip
        """`loss`: chance that a contribution is left out; `part`: that it is inside in part."""
        self.rng = random.Random(seed)
        self.seed = seed
        self.blocks, self.units, self.loss, self.part = blocks, units, loss, part
        self.fragments = Fragments.cut([1] * units, fragments)
        self.members: dict[PeerId, Member] = {}
        self.said_goodbye: set[PeerId] = set()
        self.round = 0
        self.lives = 0
        self.inside: dict[tuple[PeerId, int, int], set[int]] = {}
        """(peer, life, ordinal) -> the units in the group's state that hold its work."""
        self.reissued: set[int] = set()
        self.unasked = 0
        self.lost: set[int] = set()
        self.done: dict[int, list[tuple[int, PeerId]]] = {}
        """Ordinal -> (round, peer) for each time that the ledger counted it as trained."""

    def add(self, name: str) -> Member:
        me = PeerId(name)
        self.lives += 1
        donor = next(iter(self.members.values()), None)
        what = (RUN, self.blocks, self.units, self.fragments)
        ledger = Ledger(*what)
        if donor is not None:
            ledger = unpack_ledger(pack_ledger(donor.work.ledger), *what)
        elif self.round:
            raise AssertionError("everybody is gone")
        work = Worklist(me, ledger)
        if donor is not None:
            work.adopt(ledger, from_wire(donor.work.at_work()))
        member = Member(work, self.rng.uniform(0.5, 12), self.lives)
        member.local = {unit: set() for unit in range(self.units)}
        self.members[me] = member
        self.said_goodbye.discard(me)
        self._share()
        return member

    def crash(self, name: str) -> None:
        del self.members[PeerId(name)]
        self._share()

    def leave(self, name: str) -> None:
        """Politely: the next rounds carry its last work."""
        self.members[PeerId(name)].work.leave()

    def _share(self) -> None:
        for me, member in self.members.items():
            member.work.share(Shares(RUN, me, self.members, GroupName("g")))

    def train(self, member: Member, blocks: float) -> None:
        for _ in range(int(blocks) + (self.rng.random() < blocks % 1)):
            if member.work.open is None and member.work.next() is None:
                return
            if self.rng.random() < 0.9:  # else it stays half done for a while
                ordinal = member.work.open
                assert ordinal is not None
                member.work.finished()
                for unit in member.local.values():
                    unit.add(ordinal)

    def step(self) -> None:
        for member in self.members.values():
            self.train(member, member.speed)
            member.report = member.work.report(self.round, self.said_goodbye)
            member.frozen = {u: set(work) for u, work in member.local.items()}
        for member in self.members.values():
            self.train(member, member.speed * self.rng.uniform(0, 1))
        entries = []
        for me, member in sorted(self.members.items()):
            if self.rng.random() < self.loss:
                continue
            units = self.fragments.of(self.round)
            if member.work.leaving and not any(member.frozen[unit] for unit in units):
                if not any(member.frozen.values()):
                    member.work.drop()  # as the trainer does where the method owes nothing
                continue  # a contribution that weighs nothing is not sent
            every = (1 << len(units)) - 1
            some = self.rng.randint(1, every) if self.rng.random() < self.part else every
            cover = some << units.start
            entries.append(Entry(me, member.report, cover))
        self._apply(entries)

    def _apply(self, entries: list[Entry]) -> None:
        for entry in entries:
            member = self.members[entry.peer]
            for unit in range(self.units):
                if entry.cover >> unit & 1:
                    for ordinal in member.frozen[unit]:
                        key = (entry.peer, member.life, ordinal)
                        self.inside.setdefault(key, set()).add(unit)
                    member.local[unit] -= member.frozen[unit]
        told = set()
        for member in self.members.values():
            counted = member.work.apply(self.round, entries)
            told.add(repr(counted))
            fault = member.work.ledger.fault()
            assert not fault, f"seed {self.seed}: {fault}"
        assert len(told) <= 1, f"seed {self.seed}: members' ledgers differ"
        for peer, blocks in [*counted.trained.items(), *counted.repeated.items()]:
            for a, b in blocks:
                for ordinal in range(a, b):
                    self.done.setdefault(ordinal, []).append((self.round, peer))
        for taken in counted.reissued:
            self.reissued |= {n for a, b in taken.blocks for n in range(a, b)}
        self.lost |= {n for a, b in counted.lost for n in range(a, b)}
        self.round += 1
        for me in [m for m, x in self.members.items() if x.work.leaving]:
            if not self.members[me].work.in_flight:
                del self.members[me]
                self.said_goodbye.add(me)
                self._share()

    # ── what must hold ───────────────────────────────────────────────────────────────────
    def check(self) -> None:
        ledger = next(iter(self.members.values())).work.ledger
        where = f"seed {self.seed}, round {self.round}"
        totals = ledger.totals()
        assert totals.trained == len(self.done), where
        assert totals.repeated == sum(len(x) - 1 for x in self.done.values()), where
        assert totals.lost == len(self.lost), where
        assert totals.trained + totals.lost + totals.elsewhere == ledger.floor + len(
            ledger.accounted
        ), where
        wholly: dict[int, int] = {}
        for (_, _, ordinal), units in self.inside.items():
            if len(units) == self.units:
                wholly[ordinal] = wholly.get(ordinal, 0) + 1
        for ordinal in self.done:
            assert wholly.get(ordinal, 0) >= 1, f"{where}: {ordinal} is counted and was not trained"
        for ordinal in range(ledger.floor):
            assert ordinal in self.done or ordinal in self.lost or totals.elsewhere, where
        twice = {n for n, times in self.done.items() if len(times) > 1}
        assert len(twice - self.reissued) <= totals.unasked, where
        lives = {(me, m.life): m.work.in_flight for me, m in self.members.items()}
        for (peer, life, ordinal), units in self.inside.items():
            if (peer, life) in lives and len(units) == self.units:
                told = any(who == peer for _, who in self.done.get(ordinal, []))
                assert told or ordinal in lives[peer, life], f"{where}: {ordinal} went untold"
