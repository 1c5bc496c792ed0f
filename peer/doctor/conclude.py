"""From facts to conclusions: NAT kind, reachability, loss, bandwidth, role and codec. Pure.

One peer may lie. The clock is a median; a kind of NAT needs two observers outside; reachability is
what somebody outside could do, and a false "reachable" costs what a wrong hope costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Final

from peer.doctor.facts import Conclusions, Facts, Flow, Nat, PeerFacts, Reach, RunFacts
from peer.doctor.messages import Dialled, place_of
from tensorcodecs.chooser import CANDIDATES, Candidate, choose

SEGMENTS_MIN: Final = 100  # fewer say nothing of a loss of a few percent
SPEAKING: Final = (Dialled.NONCE, Dialled.LIBP2P, Dialled.OPEN)
UNTRIED: Final = (Dialled.RELAYED, Dialled.DECLINED)
BUSY_RTT_S: Final = 0.2  # a queue of this length in front of everything else is felt
UPLOAD_SHARE: Final = 0.8  # of the line: what keeps a home router's queue empty
AGGREGATOR_MEMBERS: Final = 2  # the least company in which a mean goes back to anybody


def conclude(facts: Facts) -> Conclusions:
    """What follows. Every field is about this machine's own line, as peers saw it."""
    outside = [peer for peer in facts.peers if peer.outside and peer.seen is not None]
    nat = nat_kind(facts, outside)
    reach, relay = reachability(facts, outside)
    up_bps = _most(peer.up_bps for peer in facts.peers)
    down_bps = _most(peer.down_bps for peer in facts.peers)
    skews = [peer.skew_s for peer in facts.peers if peer.skew_s is not None]
    rtts = [peer.rtt_s for peer in facts.peers if peer.rtt_s is not None]
    budgeted = _least([up_bps, facts.upload_bps])
    fit = codec_for(facts.run, budgeted, facts.machine.threads if facts.machine else 1)
    return Conclusions(
        nat=nat,
        reach=reach,
        relay=relay,
        lane=lane_reachable(facts, outside),
        skew_s=median(skews) if skews else None,
        rtt_s=min(rtts) if rtts else None,
        loss_up=loss([peer.up for peer in facts.peers]),
        loss_down=loss([peer.down for peer in facts.peers]),
        mtu=min((peer.mtu for peer in facts.peers if peer.mtu), default=0),
        up_bps=up_bps,
        down_bps=down_bps,
        at_least=any(peer.cut_short for peer in facts.peers),
        role=_role(reach),
        codec=fit.codec if fit else "",
        fits=fit.fits if fit else None,
        upload=_upload_advice(facts, up_bps),
    )


def nat_kind(facts: Facts, outside: list[PeerFacts]) -> Nat:
    """By what observers outside see, each of our connections from one and the same port."""
    views = {(peer.seen, peer.address): peer for peer in outside}.values()
    if not views:
        return Nat.UNKNOWN
    if all(peer.seen is not None and peer.seen.host in facts.hosts for peer in views):
        return Nat.NONE
    # Connections from other ports of ours have other outer ports under any NAT.
    ports = [peer.sent_from.port for peer in views if peer.sent_from is not None]
    usual = max(set(ports), key=ports.count) if ports else None
    same = [
        peer for peer in views
        if peer.sent_from is None or usual is None or peer.sent_from.port == usual
    ]  # fmt: skip
    hosts = {place.host for peer in same if (place := place_of(peer.address)) is not None}
    if len(same) < 2 or len(hosts) < 2:
        return Nat.SOME
    return Nat.CONE if len({peer.seen for peer in same}) == 1 else Nat.SYMMETRIC


def reachability(facts: Facts, outside: list[PeerFacts]) -> tuple[Reach, str]:
    """(whether strangers come in, the relay through which)."""
    tried = [
        outcome
        for peer in outside
        for port, outcome in peer.dialled.items()
        if port != facts.lane.port and outcome not in UNTRIED
    ]
    if any(outcome in SPEAKING for outcome in tried):
        return Reach.DIRECT, ""
    relays = [address for address in facts.addresses if "/p2p-circuit" in address]
    if relays:
        return Reach.RELAY, relays[0].partition("/p2p-circuit")[0]
    return (Reach.REFUSED if tried else Reach.UNKNOWN), ""


def lane_reachable(facts: Facts, outside: list[PeerFacts]) -> bool | None:
    """Whether strangers come in at the bulk lane's port; None: nobody tried."""
    tried = [
        outcome for peer in outside if (outcome := peer.dialled.get(facts.lane.port)) is not None
    ]
    return any(outcome in SPEAKING for outcome in tried) if tried else None


def loss(flows: Iterable[Flow | None]) -> float | None:
    """Share of segments that had to be sent again, of all of them; None: too few."""
    known = [flow for flow in flows if flow is not None]
    segments = sum(flow.segments for flow in known)
    if segments < SEGMENTS_MIN:
        return None
    return min(1.0, sum(flow.repeated for flow in known) / segments)


@dataclass(frozen=True, slots=True)
class Fit:
    """A codec for a round's contribution on this line."""

    codec: str
    bytes: int
    seconds: float
    budget_s: float
    fits: bool
    changed: bool
    """Whether the run's own codec would not be in time, and this is another one."""


def codec_for(run: RunFacts | None, bandwidth_bps: float | None, threads: int) -> Fit | None:
    """What makes a round's contribution fit: the run's codec, or else the best that is in time.

    None: no run or no bandwidth is known, or the method sends small factors exactly.
    """
    if run is None or not bandwidth_bps or run.method != "pretrain":
        return None
    values = max(1, run.parameters // run.fragments)
    wished, least = run.snr_db
    own = _fit(run, values, bandwidth_bps, threads, _named(run.codec), (-1.0, -1.0))
    if own is not None and own.fits:
        return own
    best = _fit(run, values, bandwidth_bps, threads, CANDIDATES, (wished, least))
    if best is None or best.fits:
        return best
    thin = _fit(run, values, bandwidth_bps, threads, CANDIDATES, (wished, 0.0))
    return thin or best


def _fit(
    run: RunFacts, values: int, bandwidth_bps: float, threads: int,
    candidates: tuple[Candidate, ...], snr_db: tuple[float, float],
) -> Fit | None:  # fmt: skip
    if not candidates:
        return None
    wished, least = snr_db
    choice = choose(
        values, bandwidth_bps=bandwidth_bps, budget_s=run.budget_s, snr_wished_db=wished,
        snr_min_db=least, speed=float(max(1, threads)), candidates=candidates,
    )  # fmt: skip
    return Fit(
        choice.codec, choice.bytes, choice.seconds, run.budget_s, choice.fits,
        run.codec not in ("auto", choice.codec),
    )  # fmt: skip


def _named(codec: str) -> tuple[Candidate, ...]:
    return tuple(c for c in CANDIDATES if c.codec == codec)


def _role(reach: Reach) -> str:
    return {Reach.DIRECT: "aggregator", Reach.UNKNOWN: "unknown"}.get(reach, "member")


def _upload_advice(facts: Facts, up_bps: float | None) -> str:
    """A budget below the line's rate, where sending as fast as it goes fills a long queue."""
    if up_bps is None or (facts.upload_bps is not None and facts.upload_bps <= up_bps):
        return ""
    queued = [
        peer.rtt_busy_s - peer.rtt_s
        for peer in facts.peers
        if peer.rtt_busy_s is not None and peer.rtt_s is not None
    ]
    too_much = facts.upload_bps is not None
    if not too_much and max(queued, default=0.0) < BUSY_RTT_S:
        return ""
    rate = UPLOAD_SHARE * up_bps
    return f"{rate / 1e6:.3g}mbit" if rate >= 1e6 else f"{rate / 1e3:.0f}kbit"


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
