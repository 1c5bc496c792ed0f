"""Events in words: what a volunteer reads on the terminal.

Whatever comes from strangers (names, reasons) is cleaned of control characters and cut short here,
so that nobody else can write on this terminal; and a stranger who misbehaves a thousand times is
told of a few times.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from peer.observe import events as ev
from protocols.limits import TEXT_CHARS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

NAME_CHARS: Final = 6  # of a peer id's end, where ids differ; its beginning is always 12D3KooW
QUIET_S: Final = 60.0  # the same complaint about the same peer is told once in this time
SUBJECTS_MAX: Final = 8  # peers complained of by name in that time; the rest share one line


class Line(NamedTuple):
    level: str
    """info, warning or error."""
    text: str


class Teller:
    """Turns events into lines for one reader; with `verbose`, into more of them."""

    def __init__(
        self, *, verbose: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._verbose = verbose
        self._clock = clock
        self._told: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    def tell(self, event: ev.Event) -> Line | None:
        """The event's line, or None where this reader need not hear of it (now)."""
        line = _line(event) or (_detail(event) if self._verbose else None)
        if line is None:
            return None
        match event:
            case (
                ev.PeerRefused(peer=who) | ev.MemberSuspected(peer=who) | ev.ViaFailed(address=who)
            ):
                return self._seldom(type(event).__name__, who, line)
        return line

    def _seldom(self, kind: str, who: str, line: Line) -> Line | None:
        now_s = self._clock()
        while self._told and next(iter(self._told.values()))[0] < now_s - 2 * QUIET_S:
            self._told.popitem(last=False)
        if (kind, who) not in self._told and sum(k == kind for k, _ in self._told) >= SUBJECTS_MAX:
            who = ""
        told_s, untold = self._told.get((kind, who), (now_s - QUIET_S, 0))
        if now_s - told_s < QUIET_S:
            self._told[kind, who] = told_s, untold + 1
            return None
        self._told[kind, who] = now_s, 0
        self._told.move_to_end((kind, who))
        return line._replace(text=f"{line.text} ({untold} more like this)") if untold else line


def _line(event: ev.Event) -> Line | None:
    """What every volunteer wants to hear."""
    match event:
        case ev.Started():
            return Line(
                "info",
                f"this is {short(event.peer)}, training {clean(event.run_name)}"
                f" ({count(event.parameters)} parameters) on {clean(event.device)}",
            )
        case ev.Notice():
            return Line(event.level, clean(event.text))
        case ev.ViaAnswered():
            return Line("info", f"{address(event.address)} answers")
        case ev.ViaFailed():
            return Line(
                "warning",
                f"{address(event.address)} does not answer ({clean(event.reason)});"
                f" trying again in {event.retry_s:.0f} s",
            )
        case ev.GroupChanged():
            return Line(
                "info",
                f"group {group(event.group)}: {plural(len(event.members), 'member')}"
                f" ({names(event.members)})",
            )
        case ev.MemberSuspected() if event.reason.startswith("left: "):
            return Line("info", f"{short(event.peer)} has left; rounds go on")
        case ev.MemberSuspected():
            return Line(
                "warning",
                f"{short(event.peer)} stopped answering ({clean(event.reason)}); rounds go on",
            )
        case ev.PeerRefused():
            return Line("warning", f"refused {short(event.peer)}: {clean(event.reason)}")
        case ev.RoundFinished():
            return Line("info", round_line(event))
        case ev.DigestDiffered():
            return Line(
                "warning",
                f"round {event.round}: our state differs from the group's; healing from"
                f" {short(event.donor)}",
            )
        case ev.StateReceived():
            others = len(event.given) - (event.donor in event.given)
            helped = f" and {others} more" if others else ""
            return Line(
                "info",
                f"got the run's state at round {event.round} from {short(event.donor)}{helped}:"
                f" {size(event.bytes)} in {event.seconds:.1f} s",
            )
        case ev.StateArriving():
            return Line(
                "info",
                f"the run's state is coming: {size(event.bytes)} of {size(event.total)} are here",
            )
        case ev.Reconciled():
            return Line(
                "info",
                f"the group went on without us since round {event.parted}: took its state, kept our"
                f" {event.tokens:,.0f} tokens of work for the next round",
            )
        case ev.ScoredTogether():
            told = f"{len(event.peers)} of {plural(event.members, 'peer')}"
            return Line("info", f"round {event.round}: {scores(event.sums)} ({told})")
        case ev.CaughtUp():
            return Line("info", f"made good the missed round {event.round} ({short(event.donor)})")
        case ev.CheckpointLoaded():
            skipped = "".join(f"; passed over {clean(reason)}" for reason in event.skipped)
            return Line(
                "warning" if skipped else "info",
                f"resumed at round {event.round + event.replayed} from disk{skipped}",
            )
        case ev.BlocksLost():
            lost = plural(sum(b - a for a, b in event.blocks), "block")
            return Line(
                "warning", f"round {event.round}: {lost} of the data lost; training goes on"
            )
        case ev.MixLost():
            return Line(
                "warning",
                f"mix {event.mix[:8]} with {clean(event.group)}: our side is done and theirs never"
                f" will be ({clean(event.reason)}); training goes on",
            )
        case ev.DaemonRestarted():
            return Line(
                "warning",
                f"the network daemon died ({clean(event.reason)}) and is back after"
                f" {event.seconds:.1f} s",
            )
        case ev.Left():
            return Line("info", f"left: {clean(event.reason)}")
    return None


def _detail(event: ev.Event) -> Line | None:
    """What a curious volunteer (-v) hears besides."""
    match event:
        case ev.RoundPlanned():
            text = (
                f"round {event.round} planned by {short(event.coordinator)} (epoch {event.epoch}):"
                f" {plural(len(event.roster), 'member')}, aggregators {names(event.aggregators)},"
                f" due in {event.due_s:.1f} s"
            )
        case ev.CodecChosen():
            text = f"span {event.span} to {short(event.peer)} in {event.codec}: {event.reason}"
        case ev.ContributionSent():
            text = (
                f"round {event.round}: sent {event.weight:,.0f} tokens of work,"
                f" {plural(event.steps, 'step')}, {plural(len(event.blocks), 'block')}"
            )
        case ev.BlocksCounted():
            new = sum(b - a for ranges in event.by.values() for a, b in ranges)
            told = account(asdict(event))
            text = f"round {event.round}: {plural(new, 'block')} more trained; {told}"
        case ev.MixCommitted():
            text = (
                f"mix {event.mix[:8]}: took half of what {clean(event.group)} has in"
                f" {plural(event.units, 'unit')}, and owe it the same"
            )
        case ev.MixReturned():
            text = f"mix {event.mix[:8]}: {clean(event.group)} paid {plural(event.units, 'unit')}"
        case ev.MixSettled():
            text = f"mix {event.mix[:8]} with {clean(event.group)} is done on both sides"
        case ev.MixDropped():
            text = f"no mix {event.mix[:8]} with {clean(event.group)}: {clean(event.reason)}"
        case ev.BlocksReissued():
            again = plural(sum(b - a for a, b in event.blocks), "block")
            text = (
                f"round {event.round}: {again} of {short(event.peer)} for others"
                f" ({clean(event.reason)})"
            )
        case ev.WorkCarriedOver():
            text = (
                f"round {event.round}: {event.share:.0%} of this peer's work ({event.tokens:,.0f}"
                " tokens) came too late; it goes into the next (of a zo run: is lost)"
            )
        case ev.DigestsAgreed():
            text = (
                f"round {event.round}: {plural(len(event.peers), 'peer')} agree on"
                f" {clean(event.digest)[:8]}"
            )
        case ev.Scored():
            text = f"round {event.round}: {short(event.peer)} scored {scores(event.sums)}"
        case ev.StateServed():
            text = (
                f"gave the state of round {event.round} to {short(event.peer)}: {size(event.bytes)}"
            )
        case ev.CheckpointSaved():
            text = (
                f"saved round {event.round}: {size(event.bytes)} in {event.seconds:.1f} s"
                f" ({clean(event.path)})"
            )
        case _:
            return None
    return Line("info", text)


def account(counts: Mapping[str, Any]) -> str:
    """`1,204 trained, 16 in flight, 3 re-issued, 1 repeated, 0 lost` of a `BlocksCounted`."""
    names = {"in_flight": "in flight", "reissued": "re-issued", "elsewhere": "other groups'"}
    told = ("trained", "in_flight", "reissued", "repeated", "lost", "elsewhere")
    return ", ".join(
        f"{counts[name]:,} {names.get(name, name)}"
        for name in told
        if counts[name] or name != "elsewhere"
    )


def scores(sums: Mapping[str, Any]) -> str:
    """`96 questions, perplexity 3.20, 12.5 % answered exactly, 40.0 % chosen right`."""
    parts = [plural(sums["rows"], "question")]
    if sums["perplexity"] is not None:
        parts.append(f"perplexity {sums['perplexity']:.3g}")
    if sums["exact_match"] is not None:
        parts.append(f"{sums['exact_match']:.1%} answered exactly")
    if sums["accuracy"] is not None:
        parts.append(f"{sums['accuracy']:.1%} chosen right")
    return ", ".join(parts)


def round_line(event: ev.RoundFinished) -> str:
    """`round 41  loss 2.31  val 2.40  averaged 7 of 8  0.8 s  up 1.2 MB down 3.4 MB`."""
    parts = [f"round {event.round}"]
    if event.loss is not None:
        parts.append(f"loss {event.loss:.3f}")
    if event.validation_loss is not None:
        parts.append(f"val {event.validation_loss:.3f}")
    parts.append(averaged(event))
    parts.append(f"{event.seconds:.1f} s")
    parts.append(f"up {size(event.bytes_up)} down {size(event.bytes_down)}")
    return "  ".join(parts)


def averaged(event: ev.RoundFinished) -> str:
    """How many of the roster are inside every span's mean, and whether this peer wholly is."""
    if len(event.roster) <= 1:
        return "alone"
    inside = min((len(span.contributors) for span in event.spans), default=0)
    text = f"averaged {inside} of {len(event.roster)}"
    if event.included <= 0:
        return f"{text}, without this peer's work (it counts in the next)"
    return text if event.included > 0.9995 else f"{text}, {event.included:.0%} of this peer's work"


# ── the small words ──────────────────────────────────────────────────────────────────────


def clean(text: str) -> str:
    """Printable, on one line, at most `TEXT_CHARS_MAX`: fit for a terminal whoever wrote it."""
    cut = text[:TEXT_CHARS_MAX]
    return "".join(c if c.isprintable() else " " for c in cut) + "…" * (len(text) > len(cut))


def short(peer: str) -> str:
    return f"…{clean(peer[-NAME_CHARS:])}"


def names(peers: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(map(short, peers)))


def address(multiaddress: str) -> str:
    """With the peer id at its end made short."""
    place, mark, peer = multiaddress.rpartition("/p2p/")
    return clean(place + mark) + short(peer) if mark else clean(multiaddress)


def group(name: str) -> str:
    """`site:label` as it is; `near:FOUNDER` with the founder's short name."""
    kind, _, rest = name.partition(":")
    return f"near {short(rest)}" if kind == "near" and rest else clean(name)


def size(number: float) -> str:
    """Bytes in decimal units: `812 B`, `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.4g} TB"


def count(number: int) -> str:
    """`812`, `3.1 M`."""
    value = float(number)
    for unit in ("", " k", " M"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.4g} G"


def plural(number: int, word: str) -> str:
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"
