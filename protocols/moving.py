"""Moving between groups: which one to stand in, and a loner's search for company."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from protocols.company import Company
from protocols.events import Effect, PublishRecord
from protocols.grouping import choose_group
from protocols.standing import SETTLE_S, Standing
from protocols.types import GroupName

SOUND_OUT_S: Final = 3.0  # how often a loner measures the round trip to the same peer again
SOUND_OUT_MAX: Final = 8  # and to how many a second


class Moving:
    """Asks `choose_group` every second and goes where it says."""

    def __init__(self, standing: Standing, company: Company, now_s: float) -> None:
        self._here = standing
        self._company = company
        self._regroup_s = now_s

    def regroup(self, now_s: float) -> list[Effect]:
        here = self._here
        if here.record is None or now_s < self._regroup_s:
            return []
        self._regroup_s = now_s + 1.0
        settled = now_s - here.started_s >= SETTLE_S
        if not here.group and not here.config.site and not settled:
            return []
        others = [
            (n.record, n.group)
            for n in here.members.everybody()
            if not n.left and not n.suspected and n.heard_s > 0
        ]
        rtts = {n.record.peer: n.rtt_s for n in here.members.everybody() if n.rtt_s is not None}
        mine = replace(
            here.record.record, group=here.group, site=here.config.site, round=here.round
        )
        chosen = choose_group(mine, others, rtts, here.config.members_max)
        patient = now_s - here.started_s < 3 * SETTLE_S
        company = any(group == here.group for _, group in others)
        probes = [] if company or here.config.site else self._sound_out(now_s)
        if chosen is None and patient:
            return probes
        chosen = chosen or GroupName(f"near:{here.me[-12:]}")
        if chosen == here.group:
            return probes
        here.group, here.epoch, here.started_s = chosen, 0, now_s
        here.current = here.previous = here.pending = None
        here.newcomer = True
        return [PublishRecord(chosen)]

    def _sound_out(self, now_s: float) -> list[Effect]:
        """A loner measures others again: a first round trip, on a busy machine or a connection
        that is just being made, makes neighbours look far away."""
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
