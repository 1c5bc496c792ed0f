"""What the parts of `wan` share: two systems, one laboratory, and rounds with what they cost.

Rounds are those of `averaging`, verified at every peer. Times include the gathering: on such lines
the way to an agreement is part of the round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, Final

from tests.bench.averaging import Round, play
from tests.bench.fleet import Fleet
from tests.bench.result import Bar, BenchError, Cell, Progress
from tests.netlab import Counters, Lab, LabError, missing, two_regions

PEERS: Final = 8
_INSIDE_MS: Final = 4.0
_BETWEEN_MS: Final = 80.0
_LATE_US_MAX: Final = 2000.0  # of 40 ms: a mover that is later on average had too little of a core

REFERENCE: Final = "hivemind"
OURS: Final = "murmuration"


@dataclass(frozen=True, slots=True)
class System:
    """Whom to measure, how far from the mean its codec may be, and what its workers are told."""

    module: str
    error_max: float
    start: Mapping[str, Any]


SYSTEMS: Final = {
    # One lost piece of one peer would be an error of 1/8. Over 80 ms its matchmaking needs longer.
    REFERENCE: System(
        "tests.bench.averaging_hivemind", 1e-2, {"matchmaking_s": 5.0, "request_timeout_s": 3.0}
    ),
    OURS: System("tests.bench.averaging_ours", 0.12, {"codec": "q4", "regions": 2}),
}


@dataclass(frozen=True, slots=True)
class Played:
    """One round and what passed on the lines meanwhile."""

    setting: str
    """Words that name the lines and what became of them; rounds of one setting are compared."""
    system: str
    round: Round
    sent_mb: float
    """IP bytes per peer, the mean over peers."""
    across_mb: float
    """Those of them that left their region."""
    late_us: float
    unread: int

    @property
    def seconds(self) -> float:
        return self.round.gather.seconds + self.round.seconds

    @property
    def right(self) -> bool:
        return not self.round.failure and self.unread == 0


@contextmanager
def laboratory(mbps: float, seed: int) -> Iterator[Lab]:
    """Two regions of four at `mbps` across, with nothing lost.

    Raises:
        BenchError: this machine can't have one.
    """
    lack = missing()
    if lack is not None:
        raise BenchError(lack)
    spec = two_regions(4, 4, inside_ms=_INSIDE_MS, between_ms=_BETWEEN_MS, up_mbps=mbps)
    try:
        # A network is not slower when peers compute, so the mover goes first.
        with Lab(spec, seed=seed, mover_nice=-10) as lab:
            yield lab
    except LabError as error:
        raise BenchError(str(error)) from error


@contextmanager
def crew(lab: Lab, name: str, module: str, progress: Progress, **start: Any) -> Iterator[Fleet]:
    """A started peer of `module` on every host. `start`: what they are told beside their place."""
    places = [host.command([]) for host in lab.hosts]
    with Fleet(name, module, len(places), places=places) as fleet:
        progress(f"starting {len(places)} peers of {name}")
        fleet.start([{"host": host.address} for host in lab.hosts], **start)
        yield fleet


def play_in(lab: Lab, fleet: Fleet, setting: str, name: str, number: int) -> Played:
    """One round, and what it cost the lines."""
    before = lab.counters()
    round_ = play(fleet, SYSTEMS[name].error_max, number)
    return facts(setting, name, round_, before, lab.counters())


def facts(setting: str, name: str, round_: Round, before: Counters, after: Counters) -> Played:
    """A round with what passed between the two counts."""

    def megabytes(across: bool | None) -> float:
        return mean(
            (after[host].sent(across=across) - before[host].sent(across=across)).bytes / 1e6
            for host in after.hosts
        )

    unread = sum(after[h].unread - before[h].unread for h in after.hosts)
    return Played(
        setting, name, round_, megabytes(None), megabytes(True), after.late_us_mean, unread
    )


def told(one: Played) -> str:
    """A line for whoever waits."""
    return (
        f"{one.setting}, {one.system}, round {one.round.round}: {one.seconds:.2f} s, "
        f"{one.across_mb:.2f} MB across; {one.round.failure or 'right'}"
    )


def of(played: Sequence[Played], setting: str, name: str) -> list[Played]:
    return [one for one in played if (one.setting, one.system) == (setting, name)]


def right(played: Sequence[Played]) -> list[Played]:
    return [one for one in played if one.right]


def seconds(played: Sequence[Played]) -> float | None:
    """The median of those that came out right."""
    good = right(played)
    return median(one.seconds for one in good) if good else None


def ratio(above: float | None, below: float | None) -> float | None:
    """None where either was not measured."""
    return None if above is None or not below else above / below


def row(ones: Sequence[Played]) -> dict[str, Cell]:
    """The table's row for rounds of one system in one setting, at least one."""
    good = right(ones)
    averages = [one.round.average for one in ones if one.round.average]
    return BLANK | {
        "line": ones[0].setting,
        "system": ones[0].system,
        "s, all": seconds(ones),
        "s": median(one.round.seconds for one in good) if good else None,
        "slowest": max((one.seconds for one in ones), default=None),
        "CPU-s": median(took.cpu_s for took in averages) if averages else None,
        "MB sent": mean(one.sent_mb for one in ones),
        "MB across": mean(one.across_mb for one in ones),
        "right": f"{len(good)} of {len(ones)}",
        "error": max((one.round.error for one in ones), default=None),
        "late us": max(one.late_us for one in ones),
    }


BLANK: Final[dict[str, Cell]] = dict.fromkeys((
    "line", "system", "s, all", "s", "slowest", "CPU-s", "MB sent", "MB across", "right", "error",
    "late us",
))  # fmt: skip
"""A row of the table in which nothing stands."""


def all_right(setting: str, played: Sequence[Played]) -> Bar:
    """Ours: no round that did not come out as it should."""
    ours, theirs = (of(played, setting, name) for name in (OURS, REFERENCE))
    return Bar.at_least(
        f"{setting}: rounds in which every peer had the mean",
        len(right(ours)) / len(ours) if ours else None, 1.0,
        f"{REFERENCE}: {len(right(theirs))} of {len(theirs)}",
    )  # fmt: skip


COLUMNS: Final = (
    "s, all: from the word go until the last peer had answered, gathering included; s: without it; "
    "medians of right rounds. slowest: of all, with gathering. MB: IP bytes per peer and round. "
    "error: of the worst piece on any peer, over the rms of the contributions. late us: how late "
    "the laboratory's packets were on average, beyond their delay."
)


def lines(numel: int, seed: int) -> str:
    """The setting, in words."""
    return (
        f"Seed {seed}; {PEERS} peers of {numel:,} float32 values, standard normal, fresh in every "
        f"round; one compute thread per process. Two regions of four: {_INSIDE_MS:g} ms inside, "
        f"{_BETWEEN_MS:g} ms between; Mbit/s are each peer's across regions, each way, with ten "
        "times that inside; cubic is the hosts' congestion control."
    )


def troubles(played: Sequence[Played]) -> list[str]:
    """What went wrong, round by round, and whether the laboratory is to be believed."""
    notes = [
        f"{one.setting}, {one.system}, round {one.round.round}: {one.round.failure}."
        for one in played
        if one.round.failure
    ]
    late = max((one.late_us for one in played), default=math.nan)
    if late > _LATE_US_MAX or any(one.unread for one in played):
        notes.append(
            f"The laboratory was late by up to {late:.0f} us and missed "
            f"{sum(one.unread for one in played)} packets: measure again on a quieter machine."
        )
    return notes
