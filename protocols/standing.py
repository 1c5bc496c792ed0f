"""Where a peer stands: the facts that all parts of the group's machine read and move.

Who coordinates, who is ahead and whose camp is larger follow from these facts alone, so they are
answered here. Each part (`company`, `moving`, `following`, `steering`, `healing`, `catching_up`)
holds one idea and what only it remembers; `group` puts them together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from protocols import limits
from protocols.arrivals import Arrivals
from protocols.election import candidates
from protocols.errors import RemoteProtocolError
from protocols.events import RecordIssued
from protocols.fragments import Fragments
from protocols.membership import NO_WAYS, Membership, Neighbour, seat_of
from protocols.messages import Plan, Seat
from protocols.pace import Pace
from protocols.regions import Ways
from protocols.round import Round
from protocols.types import Digest, GroupName, PeerId, RunId

GROUPS_REMEMBERED: Final = 16  # where one has been lately
SETTLE_S: Final = 2.0  # a newcomer listens this long before it believes that it is alone
RETRY_S: Final = 2.0
STRAGGLER_SHARE: Final = 0.1  # of an exchange: so much later than the first may the last few end it
BENCH_S: Final = 60.0  # who was passed over is tried again after this
EPOCH_LEAP_MAX: Final = 2**20  # epochs grow by one; more at once is a lie or an accident


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """What the manifest and the owner decide."""

    run: RunId
    units: int
    fragments: Fragments | None = None
    """Of the layout; None: every round exchanges all of it."""
    site: str = ""
    members_max: int = limits.GROUP_MEMBERS_MAX
    aggregators_max: int = 4
    round_s: float = 5.0
    """From one round's contributions to the next, if the exchange is quick enough."""
    round_s_max: float = 0.0
    """The most to which slow exchanges lengthen a round; less than `round_s`: never."""
    exchange_share: float = 0.5
    """Of a round's time that its exchange should take at most."""
    exchange_s: float = 20.0
    """A round that is not complete this long after its contributions were due is made good."""
    quorum: float = 0.5
    collect: bool = False
    """Whether regions may sum up before what they have crosses to others (`regions`)."""

    def exchanged(self, number: int) -> range:
        """The units that round `number` exchanges."""
        return range(self.units) if self.fragments is None else self.fragments.of(number)

    @property
    def rounds_kept(self) -> int:
        """Rounds whose outcomes a member keeps for the others: a state's way takes several turns of
        all fragments, however many they are, and fewer units each cost no more to keep."""
        return limits.OUTCOME_ROUNDS_KEPT * (1 if self.fragments is None else self.fragments.count)


@dataclass(slots=True)
class Attempt:
    """A fetch under way or to be repeated."""

    peer: PeerId
    until_s: float


class Outlook:
    """What follows from where everybody stands, each worked out when it is first asked for.

    Every event asks, most change nothing: so `Standing.outlook` keeps it until a fact changes.
    """

    def __init__(self, here: Standing, live: list[Neighbour], facts: tuple[object, ...]) -> None:
        self.facts = facts
        self.live = live
        """Members of our group that live, without ourselves."""
        self._here = here

    @cached_property
    def members(self) -> tuple[PeerId, ...]:
        """The group as we see it, ourselves included, in order."""
        return tuple(sorted([self._here.me, *(n.record.peer for n in self.live)]))

    @cached_property
    def ahead(self) -> list[Neighbour]:
        """Live, ready members whose state has more rounds than ours, the most first."""
        return sorted(
            (n for n in self.live if n.ready and n.round > self._here.round),
            key=lambda n: (-n.round, n.record.peer),
        )

    @cached_property
    def behind(self) -> bool:
        """Whether the state of a live, ready member has fewer rounds than ours."""
        return any(n.ready and n.round < self._here.round for n in self.live)

    @cached_property
    def in_step(self) -> bool:
        """Whether all live, ready members stand at exactly our state."""
        here = self._here
        return all(n.round == here.round and n.digest == here.digest for n in self.live if n.ready)

    @cached_property
    def seats(self) -> list[Seat]:
        """Of live, ready members who stand at our round, without ourselves."""
        return [seat_of(n.record) for n in self.live if n.ready and n.round == self._here.round]

    @cached_property
    def order(self) -> list[PeerId]:
        """Who coordinates, and who does if that one does not, and so on."""
        seats = self._eligible()
        return candidates(self._here.group, 0, seats) if seats else []

    def _eligible(self) -> list[Seat]:
        """Live, ready members who stand at the group's latest round, ourselves included.

        Newcomers come last in line: as long as a member of the plan in force lives, it
        coordinates, because it knows that plan.
        """
        here = self._here
        live = [n for n in self.live if n.ready]
        if here.ready and not here.outnumbered(live):
            # Whoever stands here with another state is about to heal, or we are.
            seats = [
                seat_of(n.record) for n in live if n.round == here.round and n.digest == here.digest
            ]
            if here.record is not None and not here.visiting:
                seats.append(seat_of(here.record.record))
        else:
            top = max([n.round for n in live], default=0)
            seats = [seat_of(n.record) for n in live if n.round == top]
        latest = here.current or here.previous
        if latest is not None:
            peers = latest.plan.peers
            return [s for s in seats if s.peer in peers] or seats
        if here.newcomer and any(n.epoch > 0 for n in live):
            return [s for s in seats if s.peer != here.me]
        return seats


class Standing:
    """Plain facts; whoever moves them says why where it does."""

    def __init__(self, me: PeerId, config: GroupConfig, now_s: float) -> None:
        self.me = me
        self.config = config
        self.pace = Pace(config.round_s, config.round_s_max, config.exchange_share)
        """How long rounds are."""
        chores_s = self.pace.chores_s_max
        self.members = Membership(
            me,
            pause_s_max=max(limits.HEARTBEAT_S, chores_s),
            record_s=max(limits.RECORD_TTL_S, 3 * chores_s),
        )
        self.group = GroupName("")
        self.round = 0
        """Rounds in our outer state: the number of the next one."""
        self.digest = Digest(b"")
        self.ready = False
        self.epoch = 0
        self._epochs: dict[GroupName, int] = {}
        """The latest that we knew of other groups: who comes back begins a new one."""
        self.current: Round | None = None
        self.previous: Round | None = None
        self.leaving = False
        self.record: RecordIssued | None = None
        self.pending: tuple[Plan, PeerId, float] | None = None
        """A plan for a round that we have not reached yet, from whom, and when it came."""
        self.started_s = now_s
        """When we came to this group."""
        self.applied_s = now_s
        self.due_s = -math.inf
        """When the contributions of the latest applied round were due."""
        self.moved_s = now_s
        """When we last got a step further: a plan, an outcome, a state."""
        self.visiting = False
        """Our state is that of the group that we came from; until we have this one's, or know
        that it has none, we take no part."""
        self.newcomer = True
        """Others know the plan in force and we don't, so one of them should coordinate."""
        self.arrivals = Arrivals(self.pace)
        """What our spans' contributions taught us about delays."""
        self.neighbours = Arrivals(self.pace)
        """The same of what we collected for our region."""
        self.firm_round = 0
        """The latest round of our history at which most of the group stood at our state."""
        self.firm_group = GroupName("")
        """Which group that was."""
        self.since = 0
        """The round at which we took the history that we have now."""
        self.agreed = -1
        """The latest round at whose start everybody's digest was the same."""
        self._benched: dict[PeerId, float] = {}
        """Alive but useless, and until when they are passed over."""
        self._outlook: Outlook | None = None

    # ── who is where ─────────────────────────────────────────────────────────────────────
    def outlook(self, now_s: float) -> Outlook:
        """What the facts come to now; the same object as long as they are the same."""
        live = self.members.live(self.group, now_s)
        latest = self.current or self.previous
        facts = (
            self.members.version, self.group, self.round, self.digest, self.ready, self.visiting,
            self.newcomer, self.record, latest, latest.plan if latest is not None else None,
        )  # fmt: skip
        if self._outlook is None or self._outlook.facts != facts:
            self._outlook = Outlook(self, live, facts)
        return self._outlook

    def live_members(self, now_s: float) -> list[PeerId]:
        """The group as we see it, ourselves included, in order."""
        return list(self.outlook(now_s).members)

    def coordinator(self, now_s: float) -> PeerId | None:
        """Who should issue the next plan, by what we know."""
        order = self.outlook(now_s).order
        if not self._benched:
            return order[0] if order else None
        return next((p for p in order if not self.is_benched(p, now_s)), next(iter(order), None))

    def outnumbered(self, live: list[Neighbour]) -> bool:
        """Whether those with more rounds than we are at least as many as those at our state.

        One that claims to be ahead does not stop a group that is at work.
        """
        ahead = sum(n.ready and n.round > self.round for n in live)
        if self.round == 0:
            return ahead > 0  # a fresh start is no history, however many share it
        return ahead >= self.camp(live)

    def camp(self, live: list[Neighbour]) -> int:
        """How many stand at exactly our state, ourselves included."""
        return 1 + sum(n.ready and n.round == self.round and n.digest == self.digest for n in live)

    def bench(self, peer: PeerId, now_s: float) -> None:
        self._benched = {p: t for p, t in self._benched.items() if t > now_s}
        if len(self._benched) < limits.ROSTER_MAX:
            self._benched[peer] = now_s + BENCH_S

    def is_benched(self, peer: PeerId, now_s: float) -> bool:
        return self._benched.get(peer, -math.inf) > now_s

    @property
    def ways(self) -> Ways:
        """Ours to the members of the plan in force, if it may tell regions apart."""
        latest = self.current or self.previous
        if not self.config.collect or latest is None:
            return NO_WAYS
        return self.members.ways(latest.plan.roster)

    def firm(self, now_s: float) -> bool:
        """Whether most of the group stand at exactly our state, counting those who fell silent
        without a goodbye within the last `FIRM_S`: of the parts of a group that is torn at most one
        passes, as long as the tear lasts no longer."""
        lately = self.members.lately(self.group, now_s)
        return 2 * self.camp(self.members.live(self.group, now_s)) > 1 + lately

    def same_digest(self, peer: PeerId) -> bool:
        if peer == self.me:
            return True
        known = self.members.get(peer)
        return known is not None and known.digest == self.digest

    def suspected(self) -> set[PeerId]:
        return self.members.suspects(self.group)

    def own_run(self, sender: PeerId, run: RunId) -> None:
        if run != self.config.run:
            raise RemoteProtocolError(sender, f"speaks of run {run[:12]}, ours is another")

    def move_to(self, group: GroupName, now_s: float) -> None:
        """Stand in another group from now on."""
        self.knew_epoch(self.group, self.epoch)
        self.group, self.epoch, self.started_s = group, self._epochs.pop(group, 0), now_s
        if group != self.firm_group:  # what most of another group had is nothing to this one
            self.firm_round, self.firm_group = 0, group

    def knew_epoch(self, group: GroupName, epoch: int) -> None:
        """Of a group, now or before."""
        if group == self.group:
            self.epoch = max(self.epoch, epoch)
        self._epochs.pop(group, None)
        self._epochs[group] = epoch
        while len(self._epochs) > GROUPS_REMEMBERED:
            del self._epochs[next(iter(self._epochs))]

    def heard_of_epoch(self, epoch: int) -> None:
        """A fellow member knows a later epoch; a leap beyond reason is not believed."""
        if epoch <= self.epoch + EPOCH_LEAP_MAX:
            self.epoch = max(self.epoch, epoch)

    def round_for(self, sender: PeerId, group: GroupName, number: int) -> Round:
        """The round in force, which a stream must belong to."""
        if group != self.group:
            raise RemoteProtocolError(sender, f"is of group {group}, ours is {self.group}")
        if self.current is None or self.current.number != number:
            mine = self.current.number if self.current else self.round
            raise RemoteProtocolError(sender, f"round {number}; we are in round {mine}")
        return self.current
