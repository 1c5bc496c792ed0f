"""Moving between groups: when to look, what to measure, and how to go without losing anything.

A peer moves only between rounds: while it trains, nothing of it is on its way. It keeps its state.
Where others stand already it is a *visitor* until it has theirs: it says that it is not ready, so
nobody follows it, and takes the state of the group's majority as a newcomer does. Those who part
from a crowded group stand at one state; the first of them find nobody there, and go on with it.
"""

from __future__ import annotations

import math
from collections import Counter as Tally
from dataclasses import replace
from typing import Final

from protocols import limits
from protocols.company import Company
from protocols.events import Effect, PublishRecord
from protocols.grouping import Grouping
from protocols.healing import Healing
from protocols.membership import Neighbour
from protocols.placing import Placing, measured_s, whom_to_measure
from protocols.standing import SETTLE_S, Standing
from protocols.types import GroupName

LOOK_S: Final = 1.0  # how often who has no company, or too much of it, looks for a better group
REVIEW_S: Final = 60.0  # and who has: nothing that counts changes faster
SOUND_OUT_S: Final = 3.0  # how often a loner measures the round trip to the same peer again
SOUND_OUT_MAX: Final = 8  # and to how many a second
STRANGERS_S: Final = 40.0  # who has company measures two strangers so often: they fix the map;
STRANGERS_S_MAX: Final = 120.0  # and no seldomer in long rounds, as some choose by it
LARGE: Final = limits.CELL_SAMPLE // 2  # a run of which a newcomer sees so many may be larger still
CELLS_READ_S: Final = 5.0  # from a coordinate to the records of its cells
CELLS_WAIT_S: Final = 20.0  # and where that takes longer, what is known has to do
VISIT_S: Final = 1.5  # a visitor listens this long before it decides whose state counts


class Moving:
    """Asks `Grouping` now and then and goes where it says."""

    def __init__(
        self, standing: Standing, company: Company, healing: Healing, placing: Placing, now_s: float
    ) -> None:
        self._here = standing
        self._company = company
        self._healing = healing
        self._placing = placing
        self._grouping = Grouping(standing.config.members_max)
        self._look_s = now_s
        self._looked_s = now_s
        self._stranger_s = now_s
        self._came_alone = True

    def regroup(self, now_s: float) -> list[Effect]:
        here = self._here
        if here.record is None or (now_s < self._look_s and not self._is_crowded(now_s)):
            return []
        self._looked_s = now_s
        self._look_s = now_s + LOOK_S
        current = here.current
        if current is not None and not current.training and now_s <= current.end_s:
            return []  # in the midst of an exchange; rounds end
        effects: list[Effect] = []
        if self._placing.news(now_s):
            effects.append(PublishRecord(here.group))
        if not here.group and not here.config.site and not self._has_looked_round(now_s):
            return effects
        members = [n for n in here.members.in_group(here.group) if not n.suspected]
        company = bool(here.group) and any(n.heard_s > 0 for n in members)
        content = company and len(members) < here.config.members_max
        self._look_s = now_s + (max(REVIEW_S, here.pace.chores_s) if content else LOOK_S)
        effects += self._sound_out(now_s) if not company else []
        others = [(n.record, n.group) for n in self._candidates(company, now_s)]
        rtts = measured_s(here.members.everybody(), now_s, here.pace.chores_s)
        mine = replace(
            here.record.record,
            group=here.group,
            site=here.config.site,
            round=here.round,
            coordinate=self._placing.told,
        )
        chosen = self._grouping.decide(mine, others, rtts, now_s)
        patient = now_s - here.started_s < 3 * SETTLE_S
        if chosen is None and patient:
            return effects
        chosen = chosen or here.group or GroupName(f"near:{here.me[-12:]}")
        if self._grouping.undecided:
            self._look_s = min(self._look_s, now_s + LOOK_S)
        return effects if chosen == here.group else [*effects, *self._go(chosen, company, now_s)]

    def _is_crowded(self, now_s: float) -> bool:
        """Whether newcomers have made the group too large since the last look."""
        here = self._here
        if not here.group or now_s - self._looked_s < LOOK_S:
            return False
        return len(here.members.in_group(here.group)) >= here.config.members_max

    def _has_looked_round(self, now_s: float) -> bool:
        """A newcomer listens before it believes that it is alone; and in a large run it needs a
        coordinate first, and time to read the records of its cells."""
        waited_s = now_s - self._here.started_s
        if len(self._here.members.everybody()) < LARGE or waited_s >= CELLS_WAIT_S:
            return waited_s >= SETTLE_S
        return now_s - self._placing.placed_s >= CELLS_READ_S

    @property
    def deadline_s(self) -> float:
        """When there is something to look at."""
        here = self._here
        if here.record is None:
            return math.inf
        return min(self._look_s, self._stranger_s if here.group else math.inf)

    def _go(self, chosen: GroupName, company: bool, now_s: float) -> list[Effect]:
        here = self._here
        self._came_alone = not company
        here.visiting = here.visiting or (here.ready and bool(here.group))
        here.move_to(chosen, now_s)
        here.current = here.previous = here.pending = None
        here.newcomer = True
        self._look_s = now_s + LOOK_S
        return [PublishRecord(chosen)]

    def _candidates(self, company: bool, now_s: float) -> list[Neighbour]:
        """Peers that live, as far as we know: who needs somebody near by a measured round trip
        asks for an answer, the others for a record."""
        trusting = company or bool(self._here.config.site)
        return [
            n
            for n in self._here.members.everybody()
            if not n.left
            and not n.suspected
            and (n.heard_s > 0 or (trusting and now_s - n.seen_s < self._here.members.record_s))
        ]

    # ── measuring ────────────────────────────────────────────────────────────────────────
    def _sound_out(self, now_s: float) -> list[Effect]:
        """A loner measures others again: a first round trip, on a busy machine or a connection
        that is just being made, makes neighbours look far away."""
        if self._here.config.site:
            return []
        others = [
            n
            for n in self._here.members.everybody()
            if not n.left and not n.suspected and now_s - n.hailed_s >= SOUND_OUT_S
        ]
        effects: list[Effect] = []
        for n in sorted(others, key=lambda n: n.hailed_s)[:SOUND_OUT_MAX]:
            n.hailed_s = now_s
            effects += self._company.greet(n.record.peer, now_s, answer=False)
        return effects

    def meet_a_stranger(self, now_s: float) -> list[Effect]:
        """Measure a far one and a near one of other groups: with only its own group's round trips
        a group would drift off the map as one."""
        here = self._here
        if now_s < self._stranger_s or not here.group:
            return []
        # A declared site is where one stays, whatever the map says.
        most_s = math.inf if here.config.site else STRANGERS_S_MAX
        self._stranger_s = now_s + min(max(STRANGERS_S, here.pace.chores_s), most_s)
        strangers = [
            n
            for n in here.members.everybody()
            if n.group != here.group and not n.left and not n.suspected
            and now_s - n.seen_s < self._here.members.record_s
        ]  # fmt: skip
        effects: list[Effect] = []
        for near in (True, False):
            found = whom_to_measure(self._placing.latest, strangers, now_s, near=near)
            if found is not None and found.hailed_s < now_s:
                found.hailed_s = now_s
                effects += self._company.greet(found.record.peer, now_s, answer=False)
        return effects

    def came_with_a_foreign_state(self, now_s: float) -> None:
        """A newcomer got the state of another group's member: it has no say in ours, whose history
        holds what others count on, and takes that as any visitor does."""
        here = self._here
        if any(n.ready for n in here.members.live(here.group, now_s)):
            here.visiting, self._came_alone = True, False

    # ── arriving ─────────────────────────────────────────────────────────────────────────
    def settle_in(self, now_s: float) -> list[Effect]:
        """A visitor takes the state of those who are there, if it is not its own already."""
        here = self._here
        self._healing.expire(now_s)
        if not here.visiting or self._healing.fetching:
            return []
        ready = [n for n in here.members.live(here.group, now_s) if n.ready]
        if any((n.round, n.digest) == (here.round, here.digest) for n in ready):
            here.visiting = False
            return []
        if now_s - here.started_s < VISIT_S:
            return []
        alone = len(ready) == 1 and self._came_alone and ready[0].round < here.round
        if not ready or alone:
            # Nobody's state to take, or of two loners ours is the longer history.
            here.visiting = False
            return []
        camps = Tally((n.round, n.digest) for n in ready)
        best = max(camps, key=lambda c: (camps[c], c))
        donors = [n for n in ready if (n.round, n.digest) == best]
        return self._healing.fetch_state(donors, now_s, step_back=True)
