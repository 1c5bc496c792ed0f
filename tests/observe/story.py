"""A short life of a peer, as events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peer.observe import events as ev

ME = "12D3KooW" + "a" * 38 + "myself"
ANN = "12D3KooW" + "b" * 38 + "ann111"
BOB = "12D3KooW" + "c" * 38 + "bob222"
PEERS = [ME, ANN, BOB]
JOIN = f"python -m peer join --via /ip4/192.168.1.10/tcp/31337/p2p/{ME}"

STARTED = ev.Started(ME, "ab" * 32, "default", [], JOIN, "cpu", 3_145_000, "/home/me/seat-1")
PLANNED = ev.RoundPlanned("site:a", 41, 3, ANN, PEERS, [ANN, BOB], 4.0, 10.0)
PROGRESS = ev.Progress(
    41, 3, 2.31, 1240.0, 7, 4.0, "training", "site:a", PEERS, [ANN, BOB], ANN, 1000, 2000, 0.012
)
FINISHED = ev.RoundFinished(
    "site:a", 41, 3, PEERS,
    [
        ev.SpanReport(0, 0, 5, ANN, 3, {ME: 9.0, ANN: 9.0}, 0.66, 1000, 0.5, "aa" * 32),
        ev.SpanReport(1, 5, 9, BOB, 3, dict.fromkeys(PEERS, 9.0), 1.0, 1000, 0.5, "bb" * 32),
    ],
    1.0, "cd" * 32, 2.31, 2.402, 1240.0, 1_200_000, 3_400_000, 0.01, 0.8,
)  # fmt: skip
SUMS: dict[str, Any] = {
    "rows": 96, "refused": 0, "tokens": 960, "loss": 1.163, "perplexity": 3.2, "asked": 96,
    "exact_match": 0.125, "questions": 0, "accuracy": None, "accuracy_per_byte": None,
}  # fmt: skip
LIFE: list[ev.Event] = [
    STARTED,
    ev.ViaFailed(f"/ip4/10.0.0.7/tcp/1/p2p/{BOB}", "connection refused", 8.0),
    ev.ViaAnswered(f"/ip4/10.0.0.8/tcp/1/p2p/{ANN}", ANN),
    ev.Notice("info", "a word"),
    ev.GroupChanged("site:a", PEERS),
    ev.StateReceived(ANN, 40, 25_000_000, 3.2, {ANN: 15_000_000, BOB: 10_000_000}),
    ev.CheckpointLoaded(40, "/x", 1, ["checkpoint-9: broken"]),
    PLANNED,
    PROGRESS,
    ev.ContributionSent(41, 512.0, [(0, 1)], 2.3, 7),
    FINISHED,
    ev.DigestsAgreed(42, "cd" * 32, PEERS),
    ev.DigestDiffered(42, "ab" * 32, "cd" * 32, ANN),
    ev.CaughtUp(42, ANN),
    ev.CheckpointSaved(42, "/x", 25_000_000, 0.2),
    ev.StateServed(BOB, 42, 25_000_000),
    ev.StateArriving(ANN, 12_000_000, 25_000_000),
    ev.MemberSuspected(BOB, "3 heartbeats missed"),
    ev.PeerRefused(BOB, "a stale epoch"),
    ev.DaemonRestarted("killed", 0.9),
    ev.WorkCarriedOver(41, 0.25, 1000.0),
    ev.Reconciled(41, 37, 5000.0),
    ev.Scored(BOB, 40, SUMS),
    ev.ScoredTogether(40, [ANN, BOB], 3, SUMS),
    ev.CodecChosen(BOB, 1, "low", 250_000, 2.1, True, "the quickest"),
    ev.BlocksCounted("site:a", 41, {ME: [(0, 3), (7, 9)]}, {}, 80, 2, 1, 5, 1, 0, 7, 9, 2, 70),
    ev.BlocksReissued(41, BOB, [(70, 75)], "left"),
    ev.BlocksLost(41, [(3, 4)]),
    ev.MixCommitted("00ab" * 4, "site:b", 0, 8, 8),
    ev.MixReturned("00ac" * 4, "site:b", 8, 16, 8),
    ev.MixSettled("00ab" * 4, "site:b", 8),
    ev.MixDropped("00ad" * 4, "site:b", "no average took it in time"),
    ev.MixLost("00ae" * 4, "site:b", 8, "the other group refuses it"),
    ev.Left("Ctrl-C"),
]


def progress(**changes: Any) -> ev.Progress:
    return replace(PROGRESS, **changes)


def finished(**changes: Any) -> ev.RoundFinished:
    return replace(FINISHED, **changes)
