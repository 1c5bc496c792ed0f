"""What the events so far add up to: the one picture behind `peer status` and the live view.

Only the event loop changes it, and only by putting a new value in a field's place, never by
changing one; so another thread (the live view's) may read it at any time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from peer.observe import events as ev
from peer.observe.words import Line, Teller

if TYPE_CHECKING:
    from collections.abc import Callable

LOSSES_KEPT: Final = 600  # ten minutes of progress: what the sparkline shows
NOTICES_KEPT: Final = 32
VIA_KEPT: Final = 32
RATE_WINDOW_S: Final = 8.0  # rates over a few seconds: a round's burst is seen, not its frames


class State:
    """Fields hold the latest event of a kind, or what follows from several."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.started: ev.Started | None = None
        self.progress: ev.Progress | None = None
        self.progress_s = 0.0
        """When `progress` came, by `clock`."""
        self.planned: ev.RoundPlanned | None = None
        self.finished: ev.RoundFinished | None = None
        self.agreed: ev.DigestsAgreed | None = None
        self.blocks: ev.BlocksCounted | None = None
        self.checkpoint: ev.CheckpointSaved | None = None
        self.checkpoint_s: float | None = None
        self.scored: dict[str, ev.Scored] = {}
        """The latest of each peer, as of the latest round that was scored."""
        self.scored_together: ev.ScoredTogether | None = None
        self.left: str | None = None
        self.group = ""
        self.members: tuple[str, ...] = ()
        self.aggregators: tuple[str, ...] = ()
        self.coordinator = ""
        self.losses: tuple[float, ...] = ()
        self.validation_loss: float | None = None
        self.via: dict[str, str] = {}
        """Address -> "answers" or the reason why not."""
        self.notices: tuple[tuple[float, Line], ...] = ()
        """(seconds since 1970, line), the latest last."""
        self._teller = Teller(clock=clock)
        self._bytes: tuple[tuple[float, int, int], ...] = ()

    def apply(self, event: ev.Event, wall_s: float) -> None:
        """Take in one event that happened at `wall_s` (seconds since 1970)."""
        match event:
            case ev.Started():
                self.started = event
            case ev.Progress():
                self._progress(event)
            case ev.RoundPlanned():
                self.planned = event
                self.group = event.group
                self.coordinator, self.aggregators = event.coordinator, tuple(event.aggregators)
            case ev.RoundFinished():
                self.finished = event
                if event.validation_loss is not None:
                    self.validation_loss = event.validation_loss
            case ev.DigestsAgreed():
                self.agreed = event
            case ev.BlocksCounted():
                self.blocks = event
            case ev.GroupChanged():
                self.group, self.members = event.group, tuple(event.members)
            case ev.Scored():
                latest = max([event.round, *(s.round for s in self.scored.values())])
                kept = {p: s for p, s in self.scored.items() if s.round == latest}
                self.scored = {**kept, event.peer: event} if event.round == latest else kept
            case ev.ScoredTogether():
                self.scored_together = event
            case ev.CheckpointSaved():
                self.checkpoint, self.checkpoint_s = event, self.clock()
            case ev.ViaAnswered():
                self._answered(event.address, "answers")
            case ev.ViaFailed():
                self._answered(event.address, event.reason)
            case ev.Left():
                self.left = event.reason
        if not isinstance(event, ev.RoundFinished | ev.Started):
            line = self._teller.tell(event)
            if line is not None:
                self.notices = (*self.notices[1 - NOTICES_KEPT :], (wall_s, line))

    def rates(self) -> tuple[float, float]:
        """Bytes per second up and down over the last seconds."""
        kept = self._bytes
        if len(kept) < 2:
            return 0.0, 0.0
        (then_s, up, down), (now_s, up_now, down_now) = kept[0], kept[-1]
        span_s = max(now_s - then_s, 1e-3)
        return (up_now - up) / span_s, (down_now - down) / span_s

    def due_s(self) -> float:
        """Seconds until the round's contributions are due, counted down since the last word."""
        if self.progress is None:
            return 0.0
        return max(0.0, self.progress.due_s - (self.clock() - self.progress_s))

    def summary(self) -> dict[str, Any]:
        """For `peer status --format json`: plain values, stable names."""
        started, progress, finished = self.started, self.progress, self.finished
        up, down = self.rates()
        return {
            "peer": started.peer if started else None,
            "run": started.run if started else None,
            "run_name": started.run_name if started else None,
            "addresses": list(started.addresses) if started else [],
            "join_command": started.join_command if started else None,
            "device": started.device if started else None,
            "parameters": started.parameters if started else None,
            "seat": started.seat if started else None,
            "phase": "left" if self.left else progress.phase if progress else "starting",
            "group": self.group,
            "members": list(self.members),
            "aggregators": list(self.aggregators),
            "coordinator": self.coordinator,
            "round": progress.round if progress else None,
            "epoch": progress.epoch if progress else None,
            "due_s": round(self.due_s(), 3),
            "loss": progress.loss if progress else None,
            "validation_loss": self.validation_loss,
            "tokens_per_s": progress.tokens_per_s if progress else 0.0,
            "bytes_up": progress.bytes_up if progress else 0,
            "bytes_down": progress.bytes_down if progress else 0,
            "bytes_up_per_s": round(up),
            "bytes_down_per_s": round(down),
            "waited_share": progress.waited_share if progress else 0.0,
            "last_round": finished,
            "digests_agreed": self.agreed,
            "blocks": self.blocks,
            "scores": {"overall": self.scored_together, "peers": dict(self.scored)},
            "checkpoint_round": self.checkpoint.round if self.checkpoint else None,
            "checkpoint_age_s": self.checkpoint_age_s(),
            "via": dict(self.via),
            "notices": [{"t": t, "level": x.level, "text": x.text} for t, x in self.notices],
        }

    def checkpoint_age_s(self) -> float | None:
        return None if self.checkpoint_s is None else round(self.clock() - self.checkpoint_s, 3)

    def _progress(self, event: ev.Progress) -> None:
        now_s = self.clock()
        self.progress, self.progress_s = event, now_s
        self.group, self.members = event.group, tuple(event.members)
        self.aggregators, self.coordinator = tuple(event.aggregators), event.coordinator
        if event.phase in ("training", "exchanging") and event.loss == event.loss:
            self.losses = (*self.losses[1 - LOSSES_KEPT :], event.loss)
        recent = [kept for kept in self._bytes if kept[0] > now_s - RATE_WINDOW_S]
        self._bytes = (*recent, (now_s, event.bytes_up, event.bytes_down))

    def _answered(self, address: str, how: str) -> None:
        via = {**self.via, address: how}
        self.via = dict(list(via.items())[-VIA_KEPT:])
