"""What a group of 4 has learned against one peer alone, after the same time.

Both train at once, so that both have the same machine under the same load; every peer's inner
steps are held to the same pace (`learning_peer`), so a group has more only because it has more
peers. The validation loss is that of the outer parameters on the same held-out text. The clock is
the first peer's: from the moment that it is up, alone at first in the group too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from tests.bench import machine
from tests.bench.fleet import Fleet
from tests.bench.result import Bar, BenchError, Cell, Progress, Result

_WORKER: Final = "tests.bench.learning_peer"
_GROUP: Final = 4
_STEP_S: Final = 0.05
_ROUND_S: Final = 2.0
_POLL_S: Final = 1.0
_ANSWER_S: Final = 30.0
_LATE_S: Final = 30.0  # of a peer whose last round comes after the end
_PACE_RATIO_MAX: Final = 1.1
_TOGETHER_MIN: Final = 0.5


@dataclass(frozen=True, slots=True)
class Pupils:
    """How one arm did: its first peer's rounds, and everybody's steps."""

    rounds: Sequence[dict[str, Any]]
    steps: Sequence[int]
    """Inner steps inside the first peer's and the others' contributions until the end."""
    outer: str
    """The outer optimiser's settings, in words."""

    def loss(self, at_s: float) -> float:
        """The validation loss at a time: the median of the last three rounds, as single ones jump.

        Raises:
            BenchError: there was none.
        """
        losses = [fact["loss"] for fact in self.rounds if fact["at_s"] <= at_s]
        if not losses:
            raise BenchError(f"no round was finished in the first {at_s:g} s; is the machine full?")
        return float(median(losses[-3:]))

    @property
    def final(self) -> float:
        """The validation loss at the end."""
        return self.loss(math.inf)

    @property
    def together(self) -> float:
        """Share of the rounds that held the work of all peers."""
        return _whole(self.rounds, len(self.steps)) / len(self.rounds)


def race(
    seed: int,
    group: int,
    seconds: float,
    *,
    whole_rounds: int = 0,
    step_s: float = _STEP_S,
    round_s: float = _ROUND_S,
    progress: Progress = lambda _: None,
) -> tuple[Pupils, Pupils]:
    """One alone and a `group` of peers over `seconds`, side by side, from the same weights.

    And on, until the group has averaged `whole_rounds` rounds of everybody's work.

    Raises:
        BenchError: a peer died or did not answer.
    """
    with ExitStack() as stack:
        fleets = [
            stack.enter_context(Fleet(name, _WORKER, size))
            for name, size in (("alone", 1), ("group", group))
        ]
        for fleet in fleets:
            fleet.start(seed=seed, step_s=step_s, round_s=round_s)
        progress(f"seed {seed}: {group} peers and one alone are up")
        deadline_s = time.monotonic() + 2 * seconds + _LATE_S
        while True:
            reports = [fleet.ask("report", _ANSWER_S) for fleet in fleets]
            over = all(answers[0]["for_s"] > seconds for answers in reports)
            if over and _whole(reports[1][0]["rounds"], group) >= whole_rounds:
                break
            if time.monotonic() > deadline_s:
                held = [fact["contributors"] for fact in reports[1][0]["rounds"]]
                raise BenchError(f"{group} peers never came together; their rounds held {held}")
            time.sleep(_POLL_S)
    if whole_rounds:
        seconds = min(answers[0]["for_s"] for answers in reports)
    alone, together = (_pupils(answers, seconds) for answers in reports)
    progress(f"seed {seed}: {together.final:.3f} together, {alone.final:.3f} alone")
    return alone, together


def _whole(rounds: Sequence[dict[str, Any]], group: int) -> int:
    """How many of them hold the work of a whole group."""
    return sum(fact["contributors"] == group for fact in rounds)


def _pupils(reports: Sequence[dict[str, Any]], seconds: float) -> Pupils:
    """Cut at the end of the race, on the first peer's clock."""
    first_s = reports[0]["for_s"]
    steps = []
    for report in reports:
        end_s = seconds - (first_s - report["for_s"])  # the same moment on this peer's clock
        steps.append(max([0, *(f["steps"] for f in report["rounds"] if f["at_s"] <= end_s)]))
    rounds = [fact for fact in reports[0]["rounds"] if fact["at_s"] <= seconds]
    return Pupils(rounds, steps, reports[0]["outer"])


@dataclass(frozen=True, slots=True)
class _Scale:
    seeds: int
    seconds: float
    looks: tuple[float, ...]
    """When the table looks at the losses."""


_FULL: Final = _Scale(seeds=3, seconds=75.0, looks=(15.0, 30.0, 45.0, 60.0, 75.0))
_QUICK: Final = _Scale(seeds=1, seconds=20.0, looks=(10.0, 20.0))


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. Five minutes; quick: under one."""
    scale = _QUICK if quick else _FULL
    load_before = machine.load_average()
    seeds = [seed + number for number in range(scale.seeds)]
    races = {each: race(each, _GROUP, scale.seconds, progress=progress) for each in seeds}
    alone = [one for one, _ in races.values()]
    groups = [group for _, group in races.values()]
    rows = [
        row
        for each, (one, group) in races.items()
        for row in (
            _row(f"{each}", "alone", [one], scale),
            _row(f"{each}", "group", [group], scale),
        )
    ]
    if scale.seeds > 1:
        rows += [_row("median", "alone", alone, scale), _row("median", "group", groups, scale)]
    ratios = [group.final / one.final for one, group in races.values()]
    paces = [max(group.steps) / max(one.steps) for one, group in races.values()]
    bars = [
        Bar.at_most(
            "learning: validation loss, group / alone, in the worst seed",
            max(ratios), 1.0, f"one peer alone at the same time; median {median(ratios):.3f}",
        ),
        Bar.at_most(
            "learning: steps of the group's fastest peer / steps of the one alone",
            max(paces), _PACE_RATIO_MAX, "a group must not win by faster peers",
        ),
        Bar.at_least(
            "learning: share of the group's rounds that hold everybody's work, in the worst seed",
            min(group.together for group in groups), _TOGETHER_MIN, "joining takes the first ones",
        ),
    ]  # fmt: skip
    load = f"{load_before}, {machine.load_average()}"
    return Result(rows, bars, _notes(groups[0].outer, load))


def _row(seed: str, arm: str, pupils: Sequence[Pupils], scale: _Scale) -> dict[str, Cell]:
    row: dict[str, Cell] = {"seed": seed, "who": arm}
    for look_s in scale.looks:
        row[f"loss at {look_s:g} s"] = f"{median(one.loss(look_s) for one in pupils):.3f}"
    row["rounds"] = round(median(len(one.rounds) for one in pupils))
    row["steps of each"] = round(median(median(one.steps) for one in pupils))
    row["all together"] = f"{median(one.together for one in pupils):.0%}"
    return row


def _notes(outer: str, load: str) -> list[str]:
    setting = (
        f"A model of 60,000 parameters on the standard library's text; rounds of {_ROUND_S:g} s; "
        f"outer Nesterov {outer}, the default run's. Every inner step of every peer takes at least "
        f"{_STEP_S * 1000:g} ms: {_GROUP + 1} peers share this machine, and each pretends to have "
        "a slow one of its own."
    )
    meaning = (
        "All together: share of the rounds that hold the work of every peer of the arm; the first "
        "rounds of a group are its first peer's alone, while the others are joining. Losses: the "
        "median of three rounds. Steps of "
        "each: the median peer's inner steps inside contributions."
    )
    return [setting, meaning, f"Load average before and after: {load}."]
