"""The judge of gossip between groups: every mix happens on both sides or on neither, and once.

It sees each mix in the outcomes that carry it and in every state that was ever reached, so it knows
what no peer can: whether the lender took away what the borrower added, unit by unit. A mix whose
other side is still owed by somebody who lives is on its way. What the product does not promise is
counted apart and not blamed: a debt that died with everybody who knew of it, whatever its lender
did later, and a group that is no more, or lives on by name only: all who had its state died, and
who came back began with another's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from peer.exchange import Outcome
from peer.observe import events as ev
from peer.simulate.books import History, read_mass
from peer.train.composite import Mix
from protocols.errors import RemoteProtocolError
from protocols.loans import Loan, MixId, mix_id, open_loan
from protocols.messages import OutcomeHeader
from protocols.types import GroupName

if TYPE_CHECKING:
    from peer.simulate.nodes import Node
    from peer.simulate.world import World

MASS: Final = "mass is conserved"
TOLD_S: Final = 5.0  # from a state to the gossip machine: a disk lies between the two
Blame = Callable[[str, "Node | None", str], None]


@dataclass(frozen=True, kw_only=True)
class MixFigures:
    """What became of the mixes of a simulation. In mixes, whichever of their units."""

    begun: int = 0
    """Some group's state had +d."""
    both: int = 0
    """All of it is on both sides."""
    pending: int = 0
    """One side is owed by somebody who lives."""
    lost: int = 0
    """The other side refused it, or could not be found, and that was said."""
    orphaned: int = 0
    """Everybody who knew of the debt is dead."""
    neither: int = 0
    """Only a history that was left behind ever had it."""
    torn: int = 0
    """One side went back to a history without it, and the other did not."""
    gone: int = 0
    """One of the groups is no more."""


@dataclass(slots=True)
class _Fact:
    loan: Loan
    d: dict[int, int] = field(default_factory=dict)
    """Unit -> d, as it was applied first."""
    plus: int = 0
    """Units (bits over the layout) in which some state of the borrower has had +d."""
    minus: int = 0
    """... and some of the lender's -d."""
    holders: set[tuple[int, int]] = field(default_factory=set)
    """(node, life): who knows the debt, as of the last look."""
    added_s: float = 0.0
    """When some state had +d anew."""
    kept: bool = True
    """Whether the last holders ended it alive, rather than died."""
    lost: str = ""
    """Why, by whoever said so."""
    forged: bool = False
    """A liar had its hand in it."""


class MixJudge:
    """One per simulation; part of `Judge`."""

    def __init__(self, world: World, blame: Blame) -> None:
        self._world = world
        self._blame = blame
        self._facts: dict[MixId, _Fact] = {}
        self._names: dict[str, MixId] = {}
        self._void_s: dict[GroupName, float] = {}
        """When nobody had a state of that group, as last seen."""

    # ── what happens ─────────────────────────────────────────────────────────────────────
    def told(self, event: ev.Event) -> None:
        if isinstance(event, ev.MixLost) and (mix := self._names.get(event.mix)) is not None:
            self._facts[mix].lost = event.reason

    def applied(
        self, node: Node, outcomes: Sequence[Outcome], before: History, after: History, *, new: bool
    ) -> None:
        """A node applies a round; `new`: nobody did before it."""
        for outcome in outcomes:
            for note in outcome.header.mixes:
                try:
                    loan = open_loan(note.loan, outcome.signed.signer)
                except RemoteProtocolError as error:
                    self._blame(MASS, node, f"an outcome with a bad loan: {error.reason}")
                    continue
                mix = mix_id(note.loan.body)
                fact = self._facts.get(mix)
                if fact is None:
                    fact = self._facts[mix] = _Fact(loan)
                    self._names[f"{mix:016x}"] = mix
                if loan.borrower == outcome.header.group:
                    fact.holders.add((node.index, node.lives))
            if new:
                self._weigh(node, outcome, before, after)

    def _weigh(self, node: Node, outcome: Outcome, before: History, after: History) -> None:
        """The mixes in a new state's units."""
        header = outcome.header
        lying = self._world.is_liar(outcome.signed.signer)
        named: dict[MixId, int] = {}
        for note in header.mixes:
            mix = mix_id(note.loan.body)
            bits = ((1 << note.stop) - 1) & ~((1 << note.start) - 1)
            named[mix] = named.get(mix, 0) | bits
            self._facts[mix].forged |= lying
        for unit, payload in enumerate(outcome.units, header.start):
            for riding in self._world.books.parts(payload)[1]:
                if named.get(riding.id, 0) >> unit & 1:
                    self._one_unit(node, header, unit, riding, before, after)
                elif not lying:
                    where = f"unit {unit} of round {header.round}"
                    self._blame(MASS, node, f"{where}: a mix that the proof does not name")

    def _one_unit(
        self, node: Node, header: OutcomeHeader, unit: int, riding: Mix, before: History,
        after: History,
    ) -> None:  # fmt: skip
        where = f"mix {riding.id:016x} in unit {unit} of round {header.round}"
        fact, bit = self._facts[riding.id], 1 << unit
        if riding.sign != fact.loan.sign_for(header.group) or header.round > riding.until:
            self._blame(MASS, node, f"{where}: wrong side, or out of time")
        if (riding.id, unit) in after.twice:
            self._blame("nothing is applied twice", node, where)
        if before.mixed.get(riding.id, (0, 0))[1] & bit:
            return
        if not after.mixed.get(riding.id, (0, 0))[1] & bit:
            return  # refused by the table
        d = read_mass(riding.payload)
        if fact.d.setdefault(unit, d) != d:
            self._blame(MASS, node, f"{where}: {riding.sign * d} against {fact.d[unit]}")
        if riding.sign > 0:
            fact.plus |= bit
            fact.added_s = self._world.now_s
            return
        fact.minus |= bit
        if not fact.plus & bit:
            self._blame(MASS, node, f"{where}: taken away, and never added")

    # ── what the judge looks at ──────────────────────────────────────────────────────────
    def look(self) -> None:
        """Now and then: who still knows of which debt."""
        knowing: dict[MixId, set[tuple[int, int]]] = {}
        lives: set[tuple[int, int]] = set()
        known = {f.loan.borrower for f in self._facts.values()}
        known |= {f.loan.lender for f in self._facts.values()}
        alive = {n.group.group for n in self._world.nodes if n.group is not None and n.group.ready}
        self._void_s |= dict.fromkeys(known - alive, self._world.now_s)
        for node in self._world.nodes:
            mixing = node.driver.mixing if node.driver is not None else None
            if mixing is None:
                continue
            lives.add((node.index, node.lives))
            for mix in mixing.machine.debts:
                knowing.setdefault(mix, set()).add((node.index, node.lives))
        for mix, fact in self._facts.items():
            holders = knowing.get(mix, set())
            if fact.holders and not holders:
                fact.kept = bool(fact.holders & lives)
            fact.holders = holders

    def final(self) -> MixFigures:
        """After the calm at the end: blame what is on one side only and that nobody will mend."""
        self.look()
        count = dict.fromkeys(
            ("begun", "both", "pending", "lost", "orphaned", "neither", "torn", "gone"), 0
        )
        states, owed = self._now()
        for mix, fact in self._facts.items():
            if not fact.plus:
                continue
            count["begun"] += 1
            count[self._fate(mix, fact, states, owed)] += 1
        return MixFigures(**count)

    def _now(self) -> tuple[dict[GroupName, list[History]], dict[MixId, int]]:
        """Every group's states, and the units in which somebody who lives means to settle a mix."""
        states: dict[GroupName, list[History]] = {}
        owed: dict[MixId, int] = {}
        for node in self._world.nodes:
            if node.driver is None or node.learner is None or node.driver.mixing is None:
                continue
            if node.driver.machine.ready and not node.spec.lie:
                states.setdefault(node.driver.machine.group, []).append(node.learner.state)
            machine = node.driver.mixing.machine
            for mix, mask in machine.debts.items():
                if mix in self._facts:
                    owed[mix] = owed.get(mix, 0) | mask << self._facts[mix].loan.start
            for mix, carried in machine.carried.items():
                if carried.sign < 0:
                    owed[mix] = owed.get(mix, 0) | carried.left << carried.loan.start
        return states, owed

    def _fate(
        self, mix: MixId, fact: _Fact, states: dict[GroupName, list[History]],
        owed: dict[MixId, int],
    ) -> str:  # fmt: skip
        loan = fact.loan
        sides = [states.get(loan.borrower, []), states.get(loan.lender, [])]
        if not all(sides):
            return "gone"
        plus, minus = (_mask(mix, side) for side in sides)
        if minus & ~plus:
            if self._ended(loan.borrower, fact):
                return "gone"
            self._one_sided(mix, fact, minus & ~plus, "the borrower lost its side")
            return "torn"
        rest = plus & ~minus
        if not rest:
            return "both" if plus else "neither"
        rest &= ~owed.get(mix, 0)
        if not rest or self._world.now_s - fact.added_s < TOLD_S:
            return "pending"
        if not fact.kept:
            return "orphaned"  # the lender's part that had -d gave way, and nobody can pay again
        if rest & fact.minus:
            if self._ended(loan.lender, fact):
                return "gone"
            self._one_sided(mix, fact, rest & fact.minus, "the lender lost its side")
            return "torn"
        if fact.lost:
            if self._ended(loan.lender, fact):
                return "gone"
            self._one_sided(mix, fact, rest, fact.lost)
            return "lost"
        self._one_sided(mix, fact, rest, "nobody owes the other side")
        return "lost"

    def _ended(self, group: GroupName, fact: _Fact) -> bool:
        """Whether nobody had a state of the group at some moment since it had its side."""
        return self._void_s.get(group, -1.0) >= fact.added_s

    def _one_sided(self, mix: MixId, fact: _Fact, units: int, why: str) -> None:
        if not fact.forged:
            loan = fact.loan
            what = f"mix {mix:016x} of {loan.borrower} with {loan.lender}"
            self._blame(MASS, None, f"{what} is on one side in units {units:b}: {why}")


def _mask(mix: MixId, states: Sequence[History]) -> int:
    found = 0
    for state in states:
        found |= state.mixed.get(mix, (0, 0))[1]
    return found


__all__ = ["MixFigures", "MixJudge"]
