"""Steering: the coordinator's office, and how others see to it that it is filled.

The first live candidate plans each round, mends the one in progress when members vanish or come,
and benches aggregators that do not deliver. Who lives and does not do the office is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from protocols import limits
from protocols.election import candidates, make_plan, revise_plan, spans_of
from protocols.events import Effect, SignPlan
from protocols.following import Following
from protocols.membership import seat_of
from protocols.messages import Plan, PlanRefused, Seat
from protocols.regions import with_regions
from protocols.round import Round
from protocols.standing import RETRY_S, SETTLE_S, STRAGGLER_SHARE, Standing
from protocols.types import PeerId

JOIN_MARGIN_S: Final = 0.7  # a round's roster grows only this long before contributions are due
TRAIN_S_MIN: Final = 0.3
FOUNDING_S: Final = 10.0  # and half a round: a run's very first plan waits so long for company
COMPANY_S: Final = 2 * limits.CALL_TIMEOUT_S  # after two failed calls a member is suspected
PATIENCE_S: Final = 6.0  # a coordinator that lives but plans nothing is passed over after this
PLANNED_AGAIN_MAX: Final = 3  # for a round: the rival may have mended its plan in the same instant


class Steering:
    """Issues plans when we coordinate, watches who does when we don't."""

    def __init__(self, standing: Standing, following: Following) -> None:
        self._here = standing
        self._following = following
        self._planned_again = (-1, 0)
        """The latest round for which two had planned, and how often we planned it once more."""

    def coordinate(self, now_s: float) -> list[Effect]:
        """Plan the next round or mend this one, if that is our office."""
        here = self._here
        if now_s < self._settled_s() or here.coordinator(now_s) != here.me:
            return []
        if self._expects_company(now_s):
            return []
        seats = self._seats(now_s)
        if here.current is None:
            return self._next_round(seats, now_s)
        return self._mend_round(here.current, seats, now_s)

    def _settled_s(self) -> float:
        """When we may plan: having listened for a while.

        A plan's spans are as many as its roster can aggregate, and those who come later share them.
        So a run's first plan waits a little longer; the work of its round is due no later for that.
        """
        here = self._here
        wait_s = SETTLE_S
        if here.round == 0 and here.previous is None:
            wait_s = max(SETTLE_S, min(FOUNDING_S, here.pace.round_s / 2))
        return here.started_s + wait_s

    def _expects_company(self, now_s: float) -> bool:
        """Whether nobody has answered us yet, and somebody still may.

        Who goes on alone while its group is at work makes a history that it has to give up again.
        """
        here = self._here
        arrived = here.current is not None or here.previous is not None
        if arrived or now_s - here.started_s >= COMPANY_S:
            return False
        return not here.members.live(here.group, now_s) and any(
            n.heard_s < 0 and not n.suspected for n in here.members.in_group(here.group)
        )

    def bench_the_useless(self, now_s: float) -> None:
        """Pass over a coordinator that lives and does not plan, or does not mend its round."""
        here = self._here
        chief = here.coordinator(now_s)
        if chief == here.me or (chief is None and not here.newcomer):
            return
        current = here.current
        if current is None:
            since_s = max(here.moved_s, self._settled_s())
            useless = now_s - since_s > PATIENCE_S and not self._on_their_way(now_s)
        else:
            since_s = max(here.moved_s, current.end_s)
            useless = now_s - since_s > RETRY_S and bool(current.missing())
        if not useless:
            return
        here.moved_s = now_s
        if current is None and here.previous is None and here.newcomer:
            # Where everybody took another's state, nobody knows a plan any more and each waits
            # for the others: from now on it is anybody's turn.
            here.newcomer = False
        elif chief is not None:
            here.bench(chief, now_s)

    def _seats(self, now_s: float) -> list[Seat]:
        """Everyone who can take part in the round that we stand at."""
        here = self._here
        assert here.record is not None
        seats = [*here.outlook(now_s).seats, seat_of(here.record.record)]
        seats = [Seat(s.peer, 0) if here.is_benched(s.peer, now_s) else s for s in seats]
        if len(seats) > limits.ROSTER_MAX:
            order = candidates(here.group, 0, seats)[: limits.ROSTER_MAX]
            seats = [s for s in seats if s.peer in order]
        return seats

    def _next_round(self, seats: list[Seat], now_s: float) -> list[Effect]:
        here = self._here
        if here.outlook(now_s).behind and now_s - here.applied_s < limits.DIGEST_WAIT_S:
            return []
        if self._on_their_way(now_s):
            return []
        same = self._placed([s for s in seats if here.same_digest(s.peer)])
        # Who begins has as long as anybody to train, and company has time to come.
        begun_s = max(here.due_s, here.started_s) if here.previous is None else here.due_s
        train_s = max(TRAIN_S_MIN, begun_s + here.pace.round_s - now_s)
        plan = make_plan(
            run=here.config.run,
            group=here.group,
            epoch=max(here.epoch, 1),
            round=here.round,
            seats=same,
            units=here.config.exchanged(here.round),
            aggregators_max=here.config.aggregators_max,
            train_ms=int(min(train_s, here.pace.round_s) * 1000),
            exchange_ms=int(here.config.exchange_s * 1000),
            digest=here.digest,
        )
        last = here.previous.plan if here.previous is not None else None
        unchanged = (
            last is not None
            and last.epoch == here.epoch
            and last.roster == plan.roster
            and self._as_elected(last)
        )
        if not unchanged:
            plan = make_plan(
                run=plan.run,
                group=plan.group,
                epoch=here.epoch + 1,
                round=plan.round,
                seats=same,
                units=here.config.exchanged(here.round),
                aggregators_max=here.config.aggregators_max,
                train_ms=plan.train_ms,
                exchange_ms=plan.exchange_ms,
                digest=here.digest,
            )
        return self._issue(plan, now_s)

    def _placed(self, seats: Sequence[Seat]) -> Sequence[Seat]:
        """The same seats, each in its region as far as we know."""
        here = self._here
        if not here.config.collect:
            return seats
        latest = here.current or here.previous
        if latest is None:
            return seats
        told = {here.me: here.ways}
        for seat in seats:
            known = here.members.get(seat.peer)
            if known is not None and known.epoch == latest.plan.epoch:
                told[seat.peer] = known.ways
        before = {seat.peer: seat.region for seat in latest.plan.roster}
        seats = [replace(s, region=before.get(s.peer, s.region)) for s in seats]
        return with_regions(seats, latest.plan.peers, told)

    def _on_their_way(self, now_s: float) -> bool:
        """Whether members of the last round that have yet to apply it should be waited for.

        Where an exchange takes minutes, an outcome reaches the first member minutes before the
        last. Most of them are waited for until that round's deadline, or the first would go on
        alone; the last few for a small part of what the exchange took.
        """
        here = self._here
        if here.previous is None:
            return False
        peers = here.previous.plan.peers
        behind = sum(
            n.ready and n.round == here.round - 1 and n.record.peer in peers
            for n in here.outlook(now_s).live
        )
        if not behind:
            return False
        if 2 * behind > len(peers):
            return now_s < here.previous.end_s
        return now_s - here.applied_s < STRAGGLER_SHARE * (here.applied_s - here.due_s)

    def _as_elected(self, plan: Plan) -> bool:
        """Whether its spans are those that anybody would elect from its roster."""
        config = self._here.config
        units = config.exchanged(plan.round)
        elected = spans_of(plan.group, plan.roster, units, config.aggregators_max, plan.epoch)
        return [(s.start, s.stop, s.aggregator) for s in plan.spans] == [
            (s.start, s.stop, s.aggregator) for s in elected
        ]

    def _mend_round(self, current: Round, seats: list[Seat], now_s: float) -> list[Effect]:
        """Take the dead out, let newcomers in, bench aggregators that do not deliver."""
        here = self._here
        if current.applying:
            return []
        plan = current.plan
        if here.me not in plan.peers:  # its members are gone, and it was not ours to mend
            here.current = None
            return self._next_round(seats, now_s)
        live = {s.peer for s in seats}
        keep = [s for s in plan.roster if s.peer in live or self._may_return(s.peer, now_s)]
        joiners = [
            s
            for s in seats
            if s.peer not in plan.peers
            and current.training
            and current.due_s - now_s > JOIN_MARGIN_S
            and here.same_digest(s.peer)
        ]
        late = [
            plan.spans[i].aggregator
            for i in current.missing()
            if now_s > current.collect_s + 0.5 * (current.end_s - current.collect_s)
        ]
        for peer in late:
            if peer != here.me and not here.is_benched(peer, now_s):
                here.bench(peer, now_s)
        if not late and not joiners and len(keep) == len(plan.roster):
            return []  # as nearly always
        room = max(0, limits.ROSTER_MAX - len(keep))
        revised = revise_plan(
            plan,
            epoch=here.epoch + 1,
            seats=self._placed(keep + joiners[:room]),
            benched={p for p in plan.peers if here.is_benched(p, now_s)},
            train_ms=int(max(0.0, current.due_s - now_s) * 1000),
            exchange_ms=plan.exchange_ms,
        )
        moved = [s.aggregator for s in revised.spans] != [s.aggregator for s in plan.spans]
        if revised.peers == plan.peers and not (late and moved):
            return []
        return self._issue(revised, now_s)

    def refused(self, refusal: PlanRefused, now_s: float) -> list[Effect]:
        """Plan the round once more, in the next epoch, if a member follows a rival of our plan.

        Where all come at once, two may plan the same round in the same epoch, each for those it
        knew, and take the others in at the same instant: then each has everybody in its roster and
        nobody follows both. By then all agree on who is to coordinate, and the round is still in
        training: without this it would last until its deadline.
        """
        here = self._here
        current = here.current
        if (
            current is None
            or not current.training
            or not refusal.known_epoch == refusal.epoch == current.plan.epoch
            or here.coordinator(now_s) != here.me
        ):
            return []
        number, times = self._planned_again
        times = times + 1 if number == current.number else 1
        if times > PLANNED_AGAIN_MAX:
            return []  # who still refuses has another reason
        self._planned_again = (current.number, times)
        plan = current.plan
        here.current = None  # its spans may be cut anew
        again = make_plan(
            run=plan.run,
            group=plan.group,
            epoch=here.epoch + 1,
            round=plan.round,
            seats=self._placed([s for s in self._seats(now_s) if here.same_digest(s.peer)]),
            units=here.config.exchanged(plan.round),
            aggregators_max=here.config.aggregators_max,
            train_ms=int(max(TRAIN_S_MIN, current.due_s - now_s) * 1000),
            exchange_ms=plan.exchange_ms,
            digest=here.digest,
        )
        return self._issue(again, now_s)

    def _may_return(self, peer: PeerId, now_s: float) -> bool:
        """A roster member that lives, whether or not it stands at our round this instant."""
        here = self._here
        if peer == here.me:
            return True
        return any(n.record.peer == peer for n in here.members.live(here.group, now_s))

    def _issue(self, plan: Plan, now_s: float) -> list[Effect]:
        here = self._here
        everyone = {n.record.peer for n in here.members.in_group(here.group)} | set(plan.peers)
        to = tuple(sorted(everyone - {here.me}))
        return [SignPlan(plan, to), *self._following.adopt(plan, here.me, now_s, now_s)]
