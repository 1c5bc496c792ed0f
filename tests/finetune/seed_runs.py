"""Zeroth-order runs small enough to test."""

from __future__ import annotations

from typing import Any

from peer.finetune import scalars
from peer.finetune.scalars import Reading
from peer.finetune.seed_rules import SeedRules
from peer.finetune.seedlog import SeedLog
from protocols.identity import Signer
from protocols.types import PeerId

BASE = bytes(range(32))


def signer(number: int) -> Signer:
    return Signer(bytes([number]) * 32)


def rules(method: str = "decomfl", **changes: Any) -> SeedRules:
    sizes: dict[str, Any] = {"perturbations": 4} if method == "decomfl" else {
        "perturbations": 1, "pool": 64,
    }  # fmt: skip
    given = {"run": b"r" * 32, "base": BASE, "seed": 7, "lr": 1e-2, "eps": 1e-3, **sizes}
    return SeedRules(method=method, **given | changes)


def reading(number: int, weight: int = 1, **scalars: float) -> Reading:
    """reading(2, weight=3, s0=1.5, s7=-2): what peer 2 found."""
    return Reading(signer(number).peer_id, weight, {int(k[1:]): v for k, v in scalars.items()})


def entry(
    log: SeedLog, who: int, values: dict[int, float], weight: float = 1, number: int | None = None
) -> bytes:
    """What peer `who` would send for the log's next round."""
    return scalars.encode(
        log.rules, signer(who), log.head, log.next if number is None else number, weight,
        scalars.quantise(values),
    )  # fmt: skip


def filled(
    log_rules: SeedRules, rounds: int, peers: int = 3, skip: PeerId | None = None
) -> SeedLog:
    """A log in which everybody sent something made up in each round, but for `skip`."""
    log = SeedLog(log_rules)
    for number in range(rounds):
        entries = {}
        for who in range(1, peers + 1):
            values = {
                (5 * number + 3 * i) % log_rules.scalars: (who - 1.7) * (i + 1) + number / 8
                for i in range(4)
            }
            entries[signer(who).peer_id] = entry(log, who, values, weight=who * 10)
        entries.pop(skip or PeerId(""), None)
        log.append(signer(1).peer_id, log.make(entries))
    return log
