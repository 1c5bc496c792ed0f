"""What a simulation comes to: figures, text for people, JSON for scripts.

Throughput and participation are told apart: the first is work that got into a state, the second
how many of those who could have been inside a round were.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from peer.simulate.world import Record


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one simulation."""

    peers: int
    hours: float
    """Simulated."""
    rounds: int
    """Group rounds that changed a state."""
    peer_rounds: int
    """Rounds applied, over all peers."""
    utilisation: float
    """Seconds of training per second in which a peer lived: sum(trained_s) / sum(alive_s)."""
    throughput: float
    """Share of the tokens that all peers could have trained in the whole time that got into a
    group's state."""
    participation: float
    """Contributors that are wholly inside, per live member, over all group rounds."""
    exchange_s: float
    """From contributions due to round applied, median."""
    calls_per_min: float
    """Control messages per peer and minute."""
    dht_reads_per_round: float
    """Per peer."""
    faults: int
    stood_still_s: float
    """Longest time in which nobody at all trained, after the first did."""
    violations: int


def figures(record: Record) -> Figures:
    scenario = record.scenario
    alive_s = sum(tally.alive_s for tally in record.tallies) or 1.0
    possible = sum(spec.tokens_per_s for spec in scenario.peers) * scenario.duration_s
    applied = sum(tally.rounds for tally in record.tallies)
    inside = sum(fact.contributors for fact in record.rounds)
    members = sum(fact.members for fact in record.rounds)
    return Figures(
        peers=len(scenario.peers),
        hours=scenario.duration_s / 3600,
        rounds=len(record.rounds),
        peer_rounds=applied,
        utilisation=sum(tally.trained_s for tally in record.tallies) / alive_s,
        throughput=sum(fact.tokens for fact in record.rounds) / possible,
        participation=inside / members if members else math.nan,
        exchange_s=_median([seconds for _, _, seconds in record.exchanges]),
        calls_per_min=60 * sum(tally.calls for tally in record.tallies) / alive_s,
        dht_reads_per_round=sum(tally.dht_reads for tally in record.tallies) / max(1, applied),
        faults=len(scenario.faults),
        stood_still_s=_longest_still(record),
        violations=len(record.violations),
    )


def replay_command(record: Record) -> str:
    """What shows this simulation again."""
    return f"python -m peer simulate {shlex.join(record.arguments)}"


def to_json(record: Record) -> dict[str, Any]:
    """Plain values: figures, violations, one entry per peer."""
    values = asdict(figures(record))
    return {
        "seed": record.scenario.seed,
        "replay": replay_command(record),
        "digest": record.digest,
        "figures": {name: _finite(value) for name, value in values.items()},
        "mixes": asdict(record.mixes),
        "ledger": asdict(record.ledger),
        "violations": [asdict(violation) for violation in record.violations],
        "faults": [asdict(fault) for fault in record.scenario.faults],
        "peers": [asdict(tally) for tally in record.tallies],
        "wall_s": round(record.wall_s, 3),
    }


def to_text(record: Record) -> str:
    """A page for people."""
    scenario, total = record.scenario, figures(record)
    kinds = Counter(str(fault.kind) for fault in scenario.faults)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    lying = sum(bool(spec.lie) for spec in scenario.peers)
    liars = f"; {lying} lying" if lying else ""
    exchange = _seconds(total.exchange_s)
    facts = {
        "faults": told + liars,
        "rounds": f"{total.rounds} in groups, {total.peer_rounds} by peers; {exchange} from due to"
        " applied (median)",
        "throughput": f"{total.throughput:.1%} of what all peers could have trained is in a state",
        "participation": f"{total.participation:.1%} of live members inside a round",
        "utilisation": f"{total.utilisation:.1%} of the time that peers lived was training",
        **_mixes(record),
        **_ledger(record),
        "control traffic": f"{total.calls_per_min:.0f} messages per peer and minute,"
        f" {total.dht_reads_per_round:.1f} DHT reads per round",
        "longest standstill": f"{_seconds(total.stood_still_s)} in which nobody trained",
        "event log": f"{record.digest[:16]} ({record.events} events)",
    }
    lines = [
        (
            f"{total.peers} peers for {_duration(scenario.duration_s)}, simulated in"
            f" {_duration(record.wall_s)}; seed {scenario.seed}"
        ),
        *(f"{name:<22} {fact}" for name, fact in facts.items()),
        "",
    ]
    if record.violations:
        lines.append(f"{len(record.violations)} promises broken:")
        lines += [
            f"  {v.at_s:9.2f} s  {v.promise}: {'' if v.node < 0 else f'peer {v.node}: '}{v.what}"
            for v in record.violations
        ]
        lines += ["", f"See it again:  {replay_command(record)}"]
    else:
        lines.append("Every promise held.")
    return "\n".join(lines)


def _mixes(record: Record) -> dict[str, str]:
    if not record.scenario.gossip_every:
        return {}
    total = record.mixes
    fates = {
        "on both sides": total.both,
        "on their way": total.pending,
        "lost": total.lost,
        "whose debt died with all who knew of it": total.orphaned,
        "undone on both sides": total.neither,
        "undone on one side": total.torn,
        "with a group that is no more": total.gone,
    }
    told = ", ".join(f"{count} {fate}" for fate, count in fates.items() if count)
    return {"mixes of groups": f"{total.begun} begun{': ' if told else ''}{told}"}


def _ledger(record: Record) -> dict[str, str]:
    if not record.scenario.blocks:
        return {}
    total = record.ledger
    told = (
        f"{total.trained} trained, {total.lost} lost, {total.elsewhere} left to other groups;"
        f" {total.reissued} re-issued, {total.repeated} trained again, {total.held} held"
    )
    return {"blocks in the ledgers": told}


def _longest_still(record: Record) -> float:
    """A sample counts as still if less than a hundredth of a peer's time went into training."""
    longest = here = 0.0
    begun = False
    for trained_s in record.trained:
        begun = begun or trained_s > 0
        here = here + record.sample_s if begun and trained_s < 0.01 * record.sample_s else 0.0
        longest = max(longest, here)
    return longest


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else math.nan


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f} s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


__all__ = ["Figures", "figures", "replay_command", "to_json", "to_text"]
