"""Watches a simulation and says which promise was broken, by whom and when.

The judge sees what no peer can: every state, every contribution, and who could reach whom. It asks
all the time that

- a span of an epoch has at most one outcome, whoever applies it;
- a mean is exactly that of the contributors in its proof, so that no mass is made or lost;
- no work is applied twice to any state;
- mixes between groups happen on both sides or on neither (`mixes`);
- the ledger of blocks adds up, and tells what is in the state (`accounts`);
- peers of a group that stand at the same round and can talk agree on the state, or heal soon;
- a round ends by its deadline, and a newcomer gets the state;
- every queue and table stays within its bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from peer.exchange import ROUNDS_HELD_MORE, Outcome, included_units
from peer.observe import events as ev
from peer.simulate.accounts import LedgerFigures, LedgerJudge
from peer.simulate.books import WIDTH, History, read_unit
from peer.simulate.mixes import MixFigures, MixJudge
from protocols import limits
from protocols.messages import Plan
from protocols.types import PeerId

if TYPE_CHECKING:
    from peer.simulate.nodes import Node
    from peer.simulate.world import World

TOLERANCE: Final = 1e-9
VIOLATIONS_MAX: Final = 50
HEAL_S: Final = 45.0  # noticed with the next heartbeat, then a state's way, a few times over
ROUND_SLACK_S: Final = 15.0
TABLES: Final[dict[str, int]] = {
    "driver._outboxes": limits.KNOWN_PEERS_MAX,
    "driver._refusals": limits.KNOWN_PEERS_MAX,
    "driver._due": 8,
    "driver._sent": 1,
    "exchange._spans": 3 * limits.AGGREGATORS_MAX,
    "exchange._outcomes": limits.OUTCOME_ROUNDS_KEPT * limits.FRAGMENTS_MAX + ROUNDS_HELD_MORE,
    "exchange._bandwidth_bps": limits.ROSTER_MAX,
    "transport._streams": limits.STREAMS_MAX + 8 * limits.ROSTER_MAX,
    "transport._serving": limits.STREAMS_MAX + 1,
    "mixing._debts": 2 * limits.CARRIED_MIXES_MAX,
    "mixing._hints": limits.GOSSIP_SLOTS_MAX,
    "gossip.carried": limits.CARRIED_MIXES_MAX,
    "gossip._debts": limits.CARRIED_MIXES_MAX,
    "gossip._leases": limits.CARRIED_MIXES_MAX,
    "gossip._open": 4 * limits.CARRIED_MIXES_MAX,
    "gossip._attempts": limits.GOSSIP_SLOTS_MAX,
    "gossip._taken": 4 * limits.CARRIED_MIXES_MAX,
    "gossip._roster_ever": 16 * limits.GROUP_MEMBERS_MAX,
    "riding.payloads": 2 * limits.CARRIED_MIXES_MAX,
    "riding._admitted": 4 * limits.LOANS_MAX,
}
"""Tables keyed by others, and the most they may hold."""
_TABLES: Final = [
    (name, name.partition(".")[0], name.partition(".")[2], most) for name, most in TABLES.items()
]


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise."""

    at_s: float
    promise: str
    node: int
    """-1: nobody in particular."""
    what: str


@dataclass(slots=True)
class RoundFact:
    """One group's round as it went into a state."""

    at_s: float
    group: str
    round: int
    contributors: int
    members: int
    """Live peers of the group when the first of them applied it."""
    tokens: float
    """Newly in the state, a mean over its units."""


_Life = tuple[int, int]
"""(node, how often it was started)."""


@dataclass
class _Watch:
    """What the judge remembers of one node."""

    calm_since_s: float = 0.0
    """When it was last started, thawed, or cut off no more."""
    moved_s: float = 0.0
    """When it last applied a round or took a state."""
    round: int = -1
    due_s: float = math.inf
    apart_since_s: float | None = None
    applied_s: list[float] = field(default_factory=list)


class Judge:
    """One per simulation."""

    def __init__(self, world: World) -> None:
        self.violations: list[Violation] = []
        self.rounds: list[RoundFact] = []
        self.exchanges: list[tuple[float, int, float]] = []
        """(when, peer, seconds from contributions due to round applied), every peer and round."""
        self.mixes = MixJudge(world, self._blame)
        self.ledgers = LedgerJudge(world, self._blame)
        self.ledger_figures = LedgerFigures()
        self.mix_figures = MixFigures()
        self._world = world
        self._watches: dict[int, _Watch] = {}
        self._contents: dict[tuple[str, int, int, int, str, bytes], tuple[bytes, set[_Life]]] = {}
        """An outcome's place, signer and base -> its content, and who applied it in which life."""
        self._seen: dict[bytes, None] = {}
        scenario = world.scenario
        state_s = 8 * scenario.load.state_bytes / scenario.slowest_bps()
        self._heal_s = HEAL_S + 2 * scenario.round_s + 3 * state_s
        self._stuck_s = 3 * scenario.exchange_s + 2 * scenario.round_s + ROUND_SLACK_S
        # Donors double with each generation of newcomers, and their lines carry rounds as well.
        generations = math.log2(max(2, len(scenario.peers)))
        self._state_s = 60.0 + (2 + 2 * generations) * state_s + limits.RECORD_REFRESH_S

    def watch(self, node: Node) -> _Watch:
        return self._watches.setdefault(node.index, _Watch())

    def disturbed(self, nodes: Sequence[Node]) -> None:
        """Something was done to these just now: their clocks of patience start anew."""
        for node in nodes:
            watch = self.watch(node)
            watch.calm_since_s = self._world.now_s
            watch.apart_since_s = None
            watch.due_s = math.inf

    def _blame(self, promise: str, node: Node | None, what: str) -> None:
        if len(self.violations) < VIOLATIONS_MAX:
            index = node.index if node is not None else -1
            now_s = round(self._world.now_s, 6)
            self.violations.append(Violation(now_s, promise, index, what))

    # ── what nodes tell ──────────────────────────────────────────────────────────────────
    def told(self, node: Node, event: ev.Event) -> None:
        watch = self.watch(node)
        if isinstance(event, ev.RoundPlanned):
            if event.round != watch.round:
                watch.round = event.round
                watch.due_s = self._world.now_s + event.due_s
        elif isinstance(event, ev.StateReceived):
            watch.moved_s = self._world.now_s
            watch.due_s = math.inf
        self.mixes.told(event)

    def applied(
        self,
        node: Node,
        number: int,
        outcomes: Sequence[Outcome],
        plan: Plan | None,
        before: History,
        after: History,
    ) -> None:
        """A node applies a round."""
        now_s = self._world.now_s
        watch = self.watch(node)
        if watch.round == number and math.isfinite(watch.due_s):
            self.exchanges.append((now_s, node.index, max(0.0, now_s - watch.due_s)))
        watch.moved_s = now_s
        watch.due_s = math.inf
        watch.applied_s.append(now_s)
        if number != before.round or after.round != number + 1:
            self._blame("applied once", node, f"round {number} on a state of {before.round}")
        units = [u for o in outcomes for u in range(o.header.start, o.header.stop)]
        if units != list(self._world.scenario.cut().of(number)):
            self._blame("applied once", node, f"round {number} on units {units}")
        for outcome in outcomes:
            self._one_content(node, outcome, before)
        new = after.digest not in self._seen
        self.mixes.applied(node, outcomes, before, after, new=new)
        if new:
            self._seen[after.digest] = None
            self._weigh(node, outcomes, before)
            self._note_round(node, number, outcomes, plan, before, after)

    def _one_content(self, node: Node, outcome: Outcome, before: History) -> None:
        header = outcome.header
        signer = outcome.signed.signer
        if self._world.is_liar(signer):
            return
        # With its disk a peer loses what it has signed. Only the history that it begins then may
        # have outcomes of the same epochs.
        base = before.digest if self._world.is_forgetful(signer) else b""
        key = (header.group, header.round, header.epoch, header.start, signer, base)
        known, appliers = self._contents.setdefault(key, (header.content, set()))
        here = (node.index, node.lives)
        if known == header.content:
            appliers.add(here)
        elif self._died_with(signer, appliers):
            # It died with its maker before it was on disk or anybody else's: it never was.
            self._contents[key] = (header.content, {here})
        else:
            self._blame(
                "one outcome per span and epoch", node,
                f"{signer[-6:]} signed two for span {header.span} of round {header.round}"
                f" in epoch {header.epoch}",
            )  # fmt: skip

    def _died_with(self, signer: PeerId, appliers: set[_Life]) -> bool:
        """Whether only earlier lives of the signer itself applied something."""
        maker = self._world.node_of(signer)
        return all(index == maker.index and life < maker.lives for index, life in appliers)

    def _weigh(self, node: Node, outcomes: Sequence[Outcome], before: History) -> None:
        """The mean of every unit, from what its contributors really made."""
        books = self._world.books
        for outcome in outcomes:
            header = outcome.header
            if self._world.is_liar(outcome.signed.signer):
                continue
            masks = {c.peer: included_units([outcome], c.peer) for c in header.contributors}
            for at, payload in enumerate(outcome.units):
                proven = {p: c for p, c in zip(masks, header.contributors, strict=True)
                          if masks[p][at]}  # fmt: skip
                where = f"unit {header.start + at} of round {header.round}"
                mean, _ = books.parts(payload)
                if not mean:
                    if proven:
                        self._blame("mass is conserved", node, f"{where}: a proof of nothing")
                    continue
                unit = read_unit(mean)
                total, sums = 0.0, [0.0] * WIDTH
                for author, number in unit.inside:
                    made = books.contributions.get(author, {}).get(number)
                    peer = self._world.nodes[author].id
                    if made is None or peer not in proven:
                        self._blame("mass is conserved", node, f"{where}: {author} is not in proof")
                        return
                    weight = proven.pop(peer).weight
                    total += weight
                    row = made.delta_UD[header.start + at]
                    sums = [s + weight * float(v) for s, v in zip(sums, row, strict=True)]
                    done = before.works.get(author)
                    twice = made.works[header.start + at] & (done[header.start + at] if done else 0)
                    if twice and not self._world.nodes[author].spec.lie:
                        self._blame("nothing is applied twice", node, f"{where}: work of {author}")
                if proven:
                    self._blame("mass is conserved", node, f"{where}: less inside than in proof")
                for got, value in zip(unit.values, sums, strict=True):
                    if abs(got - value / total) > TOLERANCE:
                        self._blame("mass is conserved", node, f"{where}: {got} != {value / total}")

    def _note_round(
        self,
        node: Node,
        number: int,
        outcomes: Sequence[Outcome],
        plan: Plan | None,
        before: History,
        after: History,
    ) -> None:
        machine = node.group
        group = machine.group if machine is not None else ""
        members = [n for n in self._world.nodes if n.group is not None and n.group.group == group]
        shares: dict[str, int] = {}
        tokens = 0.0
        units = self._world.scenario.units
        exchanged = sum(o.header.stop - o.header.start for o in outcomes)
        for outcome in outcomes:
            size = outcome.header.stop - outcome.header.start
            for c in outcome.header.contributors:
                inside = sum(b.bit_count() for b in c.mask) if c.mask else size
                shares[c.peer] = shares.get(c.peer, 0) + inside
                tokens += c.weight * inside / units
        whole = sum(count == exchanged for count in shares.values())
        self.rounds.append(RoundFact(self._world.now_s, group, number, whole, len(members), tokens))

    # ── what the judge looks at ──────────────────────────────────────────────────────────
    def look(self) -> None:
        """Every second or so."""
        world, now_s = self._world, self._world.now_s
        camps: dict[tuple[str, int], dict[bytes, list[Node]]] = {}
        for node in world.nodes:
            machine = node.group
            if machine is None or node.frozen or node.spec.lie or world.is_cut_off(node):
                continue
            watch = self.watch(node)
            calm_s = now_s - watch.calm_since_s
            if machine.ready:
                key = (machine.group, machine.round)
                camps.setdefault(key, {}).setdefault(machine.digest, []).append(node)
            elif calm_s > self._state_s and world.has_donor(node):
                self._blame("a newcomer gets the state", node, f"waits for {calm_s:.0f} s")
                watch.calm_since_s = now_s
            late_s = now_s - watch.due_s
            if machine.ready and late_s > self._stuck_s and machine.round == watch.round:
                self._blame("a round ends by its deadline", node,
                            f"round {watch.round} is {late_s:.0f} s late")  # fmt: skip
                watch.due_s = math.inf
            still_s = now_s - max(watch.moved_s, watch.calm_since_s)
            if machine.ready and still_s > 2 * self._stuck_s and not math.isfinite(watch.due_s):
                self._blame("nobody stands still", node, f"no round for {still_s:.0f} s")
                watch.moved_s = now_s
            self._measure(node)
        self.mixes.look()
        for (group, number), digests in camps.items():
            self._agree(group, number, digests)

    def _agree(self, group: str, number: int, digests: dict[bytes, list[Node]]) -> None:
        now_s = self._world.now_s
        apart = len(digests) > 1
        for nodes in digests.values():
            for node in nodes:
                watch = self.watch(node)
                if not apart:
                    watch.apart_since_s = None
                elif watch.apart_since_s is None:
                    watch.apart_since_s = now_s
        if not apart:
            return
        everyone = [node for nodes in digests.values() for node in nodes]
        since_s = [self.watch(node).apart_since_s or now_s for node in everyone]
        if now_s - max(since_s) > self._heal_s:
            camps = " | ".join(
                f"{d.hex()[:6]}: {[n.index for n in nodes]}" for d, nodes in digests.items()
            )
            self._blame("groups agree", everyone[0], f"{group} at round {number}: {camps}")
            self.disturbed(everyone)

    def _measure(self, node: Node) -> None:
        driver = node.driver
        if driver is None:
            return
        places: dict[str, object] = {
            "driver": driver, "exchange": driver.exchange, "transport": driver.transport,
        }  # fmt: skip
        if driver.mixing is not None:
            places |= {
                "mixing": driver.mixing, "gossip": driver.mixing.machine,
                "riding": driver.mixing.riding,
            }  # fmt: skip
        for name, owner, attribute, most in _TABLES:
            table: Sized = getattr(places.get(owner), attribute, ())
            if len(table) > most:
                self._blame("tables are bounded", node, f"{name} holds {len(table)} of {most}")
        for box in driver._outboxes.values():
            if len(box) > limits.OUTBOX_MESSAGES_MAX:
                self._blame("tables are bounded", node, f"an outbox holds {len(box)}")

    def final(self) -> None:
        """After the calm at the end: everybody who lives is in step with its group."""
        world = self._world
        self.ledgers = LedgerJudge(world, self._blame)
        self.ledger_figures = LedgerFigures()
        self.mix_figures = self.mixes.final()
        self.ledger_figures = self.ledgers.final()
        groups: dict[str, list[Node]] = {}
        for node in world.nodes:
            machine = node.group
            if machine is None or node.frozen or node.spec.lie or world.is_cut_off(node):
                continue
            calm_s = world.now_s - self.watch(node).calm_since_s
            if machine.ready and not machine.visiting and calm_s > self._heal_s:
                groups.setdefault(machine.group, []).append(node)
        for group, nodes in groups.items():
            rounds = [n.group.round for n in nodes if n.group is not None]
            # Who catches up does so at about the pace of rounds; so long may it take.
            scenario = world.scenario
            if max(rounds) - min(rounds) > 2 + self._heal_s * scenario.fragments / scenario.round_s:
                self._blame("groups agree", nodes[0], f"{group} ends at rounds {sorted(rounds)}")
