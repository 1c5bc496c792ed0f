"""Steering: the coordinator's office, and how others see to it that it is filled.

The first live candidate plans each round, mends the one in progress when members vanish or come,
and benches aggregators that do not deliver. Who lives and does not do the office is passed over.
"""

from __future__ import annotations

from typing import Final

from protocols import limits
from protocols.election import candidates, make_plan, revise_plan, spans_of
from protocols.events import Effect, SignPlan
from protocols.following import Following
from protocols.membership import seat_of
from protocols.messages import Plan, Seat
from protocols.round import Round
from protocols.standing import RETRY_S, SETTLE_S, Standing
from protocols.types import PeerId

JOIN_MARGIN_S: Final = 0.7  # a round's roster grows only this long before contributions are due
TRAIN_S_MIN: Final = 0.3
COMPANY_S: Final = 2 * limits.CALL_TIMEOUT_S  # after two failed calls a member is suspected
PATIENCE_S: Final = 6.0  # a coordinator that lives but plans nothing is passed over after this


class Steering:
    """Issues plans when we coordinate, watches who does when we don't."""

    def __init__(self, standing: Standing, following: Following) -> None:
        self._here = standing
        self._following = following

    def coordinate(self, now_s: float) -> list[Effect]:
        """Plan the next round or mend this one, if that is our office."""
        here = self._here
        settled = now_s - here.started_s >= SETTLE_S
        if not settled or here.coordinator(now_s) != here.me or self._expects_company(now_s):
            return []
        seats = self._seats(now_s)
        if here.current is None:
            return self._next_round(seats, now_s)
        return self._mend_round(here.current, seats, now_s)

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
            since_s = max(here.moved_s, here.started_s + SETTLE_S)
            useless = now_s - since_s > PATIENCE_S
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
        same = [s for s in seats if here.same_digest(s.peer)]
        train_s = max(TRAIN_S_MIN, here.due_s + here.pace.round_s - now_s)
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
            seats=keep + joiners[:room],
            benched={p for p in plan.peers if here.is_benched(p, now_s)},
            train_ms=int(max(0.0, current.due_s - now_s) * 1000),
            exchange_ms=plan.exchange_ms,
        )
        moved = [s.aggregator for s in revised.spans] != [s.aggregator for s in plan.spans]
        if revised.peers == plan.peers and not (late and moved):
            return []
        return self._issue(revised, now_s)

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
