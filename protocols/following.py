"""Following plans: which are lawful, which are refused, and taking one up.

One plan is in force at a time and never an older one (the epoch is a fencing token). A plan for a
round that we have not reached waits until we have.
"""

from __future__ import annotations

import math

from protocols.election import fault_in
from protocols.errors import RemoteProtocolError
from protocols.events import Effect, PlanAdopted, Send
from protocols.messages import PLAN_DOMAIN, Plan, PlanRefused, open_signed
from protocols.records import Signed
from protocols.round import Round
from protocols.standing import EPOCH_LEAP_MAX, Standing
from protocols.types import PeerId


class Following:
    """The plan in force, and how it changes."""

    def __init__(self, standing: Standing) -> None:
        self._here = standing

    def plan_issued(self, sender: PeerId, signed: Signed, now_s: float) -> list[Effect]:
        here = self._here
        plan = open_signed(signed, PLAN_DOMAIN, Plan, sender)
        here.own_run(sender, plan.run)
        if signed.signer != sender:
            raise RemoteProtocolError(sender, f"passes on a plan of {signed.signer}")
        if plan.group != here.group:
            raise RemoteProtocolError(sender, f"plans for group {plan.group}, ours is {here.group}")
        known = here.members.get(sender)
        if known is None or known.group != here.group:
            raise RemoteProtocolError(sender, "plans for a group that it is not in")
        if sender not in plan.peers:
            raise RemoteProtocolError(sender, "plans a round without itself")
        if plan.epoch > here.epoch + EPOCH_LEAP_MAX:
            raise RemoteProtocolError(sender, f"leaps to epoch {plan.epoch}")
        longest_s = max(here.config.round_s, here.config.round_s_max)
        if plan.train_ms > longest_s * 1000 + 1:
            raise RemoteProtocolError(sender, f"plans {plan.train_ms} ms of training")
        if plan.exchange_ms > here.config.exchange_s * 1000 + 1:
            raise RemoteProtocolError(sender, f"plans {plan.exchange_ms} ms of exchange")
        revises = here.current is not None and here.current.number == plan.round
        units = here.config.exchanged(plan.round)
        reason = fault_in(plan, units, here.config.aggregators_max, revises=revises)
        if reason is not None:
            raise RemoteProtocolError(sender, f"plans {reason}")
        here.members.heard(sender, now_s)
        refusal = self._refusal(plan, sender, now_s)
        if refusal:
            no = PlanRefused(plan.run, plan.group, plan.epoch, here.epoch, refusal)
            return [Send(sender, no)]
        if not here.ready or here.visiting or plan.round > here.round:
            if here.pending is None or plan.epoch >= here.pending[0].epoch:
                here.pending = (plan, sender, now_s)
            here.epoch = max(here.epoch, plan.epoch)
            return []
        return self.adopt(plan, sender, now_s, now_s)

    def _refusal(self, plan: Plan, sender: PeerId, now_s: float) -> str:
        here = self._here
        latest = here.current or here.previous
        in_force = latest.plan if latest is not None else None
        if in_force is not None and plan.epoch < in_force.epoch:
            return f"epoch {in_force.epoch} is in force"
        if in_force is not None and plan.epoch == in_force.epoch:
            if plan.round < in_force.round or plan == in_force:
                return f"round {in_force.round} is in force"
            if plan.round == in_force.round:
                return "another plan of this epoch is in force"
            if plan.roster != in_force.roster:
                return "another roster needs another epoch"
        current = here.current
        if current is not None and current.number == plan.round:
            if current.applying:
                return f"round {plan.round} is being applied"
            if not current.training and not same_bounds(plan, current.plan):
                return f"round {plan.round} is cut otherwise"
        if plan.round < here.round:
            return f"round {here.round} is where we stand"
        if (
            here.ready
            and not here.visiting
            and plan.round == here.round
            and plan.digest != here.digest
        ):
            return "it starts from another state"
        return ""

    def adopt(
        self, plan: Plan, coordinator: PeerId, received_s: float, now_s: float
    ) -> list[Effect]:
        here = self._here
        here.epoch = max(here.epoch, plan.epoch)
        here.pending = None
        here.moved_s = now_s
        current = here.current
        if current is not None and current.number == plan.round and same_bounds(plan, current.plan):
            effects = current.revise(plan, now_s)
            return [PlanAdopted(plan, coordinator, current.due_s), *effects]
        if coordinator != here.me and math.isfinite(here.due_s):
            here.pace.followed(received_s + plan.train_ms / 1000 - here.due_s)
        here.current = Round(
            here.me, plan, received_s, here.config.quorum, here.arrivals, here.neighbours
        )
        return [PlanAdopted(plan, coordinator, here.current.due_s)]

    def adopt_pending(self, now_s: float) -> list[Effect]:
        here = self._here
        if here.pending is None:
            return []
        plan, coordinator, received_s = here.pending
        if plan.round > here.round:
            return []
        here.pending = None
        if self._refusal(plan, coordinator, now_s) or plan.digest != here.digest:
            return []
        return self.adopt(plan, coordinator, received_s, now_s)


def same_bounds(one: Plan, other: Plan) -> bool:
    """Whether two plans cut the layout alike."""
    return [(s.start, s.stop) for s in one.spans] == [(s.start, s.stop) for s in other.spans]
