"""Who coordinates and who aggregates: the same answer at every peer, from the same seats.

Weighted rendezvous (highest-random-weight) hashing: every (slot, peer) pair gets a score
-w / ln(u) with u uniform from a hash; the order of scores is the order of candidates. A peer that
vanishes moves only its own spans. Formula: Mosharaf et al., "Weighted distributed hash tables".

A weight is what a peer says of itself. It decides who serves, and how much: but no span is sized
by more than `WEIGHT_RATIO_MAX` times the usual weight, so whoever boasts gets a few shares and not
all of them. (The order of candidates is left alone: were it to depend on the others' weights, one
that goes would move spans that are not its own.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final

from protocols.messages import Plan, Seat, Span
from protocols.types import Digest, GroupName, PeerId, RunId

WEIGHT_RATIO_MAX: Final = 4  # of a seat to the median; half a group would have to lie to move that


def fair(seats: Iterable[Seat]) -> list[Seat]:
    """The same seats, with weights that are not far above the median of those that others can
    reach (weight above 1)."""
    found = list(seats)
    usual = sorted(seat.weight for seat in found if seat.weight > 1)
    if not usual:
        return found
    most = WEIGHT_RATIO_MAX * usual[(len(usual) - 1) // 2]
    return [seat if seat.weight <= most else replace(seat, weight=most) for seat in found]


def candidates(group: GroupName, slot: int, seats: Iterable[Seat]) -> list[PeerId]:
    """Peers in the order in which they serve `slot` of `group`; the first live one does.

    Those that others can't reach (weight 1) come behind the others, benched ones (0) last.
    """
    order = sorted(seats, key=lambda s: (_rank(s), -_score(group, slot, s), s.peer))
    return [seat.peer for seat in order]


def able_to_serve(seats: Sequence[Seat]) -> list[Seat]:
    """Those that others can reach; where nobody can be reached, those that are not benched; else
    all."""
    best = min(map(_rank, seats))
    return [seat for seat in seats if _rank(seat) == best]


def _rank(seat: Seat) -> int:
    return 0 if seat.weight > 1 else 2 - seat.weight


@lru_cache(maxsize=2**16)
def _score(group: GroupName, slot: int, seat: Seat) -> float:
    raw = hashlib.sha256(f"{group}\x00{slot}\x00{seat.peer}".encode()).digest()
    return -max(seat.weight, 1) / math.log(_uniform(raw))


def _uniform(raw: bytes) -> float:
    """Strictly between 0 and 1: 52 bits and a half fit a float exactly, 64 would round up to 1."""
    return ((int.from_bytes(raw[:8], "big") >> 12) + 0.5) / 2**52


def spans_of(
    group: GroupName, seats: Sequence[Seat], units: range, aggregators_max: int, epoch: int
) -> tuple[Span, ...]:
    """Cut `units` into spans sized by their aggregators' weights, one aggregator each.

    Slot k's aggregator is its first candidate that has no earlier slot. At most
    `aggregators_max` spans, never more than units; and none for who can't be reached while
    somebody can.
    """
    able = able_to_serve(seats)
    count = max(1, min(len(able), aggregators_max, len(units)))
    chosen: list[PeerId] = []
    for slot in range(count):
        chosen.append(next(p for p in candidates(group, slot, able) if p not in chosen))
    weights = {seat.peer: max(seat.weight, 1) for seat in fair(able)}
    total = sum(weights[peer] for peer in chosen)
    spans: list[Span] = []
    start, taken = units.start, 0
    for slot, peer in enumerate(chosen):
        taken += weights[peer]
        left = count - slot - 1
        share = units.start + len(units) * taken // total
        stop = units.stop if left == 0 else min(max(share, start + 1), units.stop - left)
        spans.append(Span(start, stop, peer, epoch))
        start = stop
    return tuple(spans)


def make_plan(
    *,
    run: RunId,
    group: GroupName,
    epoch: int,
    round: int,  # noqa: A002  (the field's word)
    seats: Sequence[Seat],
    units: range,
    aggregators_max: int,
    train_ms: int,
    exchange_ms: int,
    digest: Digest,
) -> Plan:
    """A round's first plan: a pure function of the seats. `units`: what the round exchanges."""
    roster = tuple(sorted(seats, key=lambda s: s.peer))
    spans = spans_of(group, roster, units, aggregators_max, epoch)
    return Plan(run, group, epoch, round, roster, spans, train_ms, exchange_ms, digest)


def revise_plan(
    plan: Plan,
    *,
    epoch: int,
    seats: Sequence[Seat],
    benched: Collection[PeerId],
    train_ms: int,
    exchange_ms: int,
) -> Plan:
    """The same round for another roster: spans keep their bounds, and their aggregator if it is
    still there and not `benched` (alive but useless); others go to their next candidate."""
    roster = tuple(
        sorted(
            (replace(s, weight=0) if s.peer in benched else s for s in seats), key=lambda s: s.peer
        )
    )
    able = {seat.peer for seat in roster if seat.weight > 0} or {seat.peer for seat in roster}
    spans = tuple(
        span
        if span.aggregator in able
        else Span(span.start, span.stop, candidates(plan.group, slot, roster)[0], epoch)
        for slot, span in enumerate(plan.spans)
    )
    return Plan(
        plan.run, plan.group, epoch, plan.round, roster, spans, train_ms, exchange_ms, plan.digest
    )


def fault_in(plan: Plan, units: range, aggregators_max: int, *, revises: bool) -> str | None:
    """What is wrong with a plan, or None. Any member can check any plan.

    `units`: what its round exchanges; the spans must cover exactly these.
    `revises`: it replaces a plan that is in force for the same round, and so keeps its bounds.
    Otherwise, if all its spans are of its own epoch, they must be what anybody would elect: for
    the round's first plan, or for a revision of one that this member never saw (it came back
    after that), in which every aggregator gave way to its successor.
    """
    peers = plan.peers
    if not peers or peers != sorted(set(peers)):
        return "a roster that is empty, repeats itself or is out of order"
    if not plan.spans or len(plan.spans) > max(1, aggregators_max):
        return "no spans, or too many"
    edge = units.start
    for span in plan.spans:
        if span.start != edge or span.stop <= span.start:
            return "spans that do not cover the round's units"
        if span.aggregator not in peers:
            return "an aggregator outside the roster"
        if span.since_epoch > plan.epoch:
            return "a span from a later epoch"
        edge = span.stop
    if edge != units.stop:
        return "spans that do not cover the round's units"
    if not revises and all(span.since_epoch == plan.epoch for span in plan.spans):
        elected = spans_of(plan.group, plan.roster, units, aggregators_max, plan.epoch)
        if plan.spans != elected and not all(
            span.aggregator == candidates(plan.group, slot, plan.roster)[0]
            for slot, span in enumerate(plan.spans)
        ):
            return "aggregators that nobody elected"
    return None
