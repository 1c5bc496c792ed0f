"""Averaging 25 M float32 parameters among 4 peers on loopback, against hivemind.

Both systems run in the same minutes, one round of each in turn, while the other one idles. A
round, in every peer at once:

- `prepare`: fresh random tensors, different for every peer and round. Not timed.
- `gather`: matchmaking, agreement on a plan; everything that moves or encodes no tensor data.
- `average`: from the tensor in memory to the mean in memory on the last of the peers.
- `verify`: every peer recomputes all contributions and compares. Not timed.

To plug a system in, write its worker (`averaging_hivemind` is one; `serve_async` is there for
event loops) and name it in `_SYSTEMS`; it is measured as soon as its module exists.
`start(index, size, via, numel, seed)` answers `{"addresses": [...]}`, `gather(number)` and
`average(number)` answer `{}` or `{"failure": why}`, `verify(number)` answers
`tensors.check(...).facts()`, `prepare(number)` and `cancel(number)` (some peer's `gather` failed:
drop the round) answer `{}`; `number` is the round's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Final

from tests.bench.fleet import Fleet, Took
from tests.bench.result import Bar, Cell, Progress, Result
from tests.bench.tensors import Check


@dataclass(frozen=True, slots=True)
class System:
    """Whom to measure, and how far from the true mean its codec may be."""

    module: str
    error_max: float
    start: Mapping[str, str]
    """More arguments for its workers' `start`."""


_REFERENCE: Final = "hivemind"
_OURS: Final = "murmuration"
_OURS_8_BIT: Final = "murmuration, 8 bit"
_SYSTEMS: Final = {
    # One lost piece of one peer would be an error of 0.25, whatever the codec.
    _REFERENCE: System("tests.bench.averaging_hivemind", 1e-2, {}),
    _OURS: System("tests.bench.averaging_ours", 0.12, {"codec": "q4"}),  # it has 0.101
    _OURS_8_BIT: System("tests.bench.averaging_ours", 1e-2, {"codec": "int8-raw"}),  # 0.006
}

_PEERS: Final = 4
_STEP_TIMEOUT_S: Final = 120.0
_QUIET: Final = 0.1  # others may use this share of the cores before it says so
_SPARE_ROUNDS: Final = 5  # a failed or wrong round of the reference is told and played again


@dataclass(frozen=True, slots=True)
class _Scale:
    numel: int
    warm_up: int
    measured: int


_FULL: Final = _Scale(numel=25_000_000, warm_up=1, measured=7)
_QUICK: Final = _Scale(numel=1_000_000, warm_up=1, measured=2)


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one system, all peers together."""

    round: int
    gather: Took
    average: Took | None
    """None if it never came to that."""
    checks: list[Check]
    failure: str
    """Why its result can't be used; empty if every peer has the true mean."""

    @property
    def error(self) -> float:
        return max((check.error for check in self.checks), default=math.inf)

    @property
    def identical(self) -> bool:
        return len({check.digest for check in self.checks}) == 1

    @property
    def seconds(self) -> float:
        return self.average.seconds if self.average else math.nan

    @property
    def cpu_s(self) -> float:
        return self.average.cpu_s if self.average else math.nan


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. A few minutes; quick: half a minute."""
    scale = _QUICK if quick else _FULL
    systems = [name for name, system in _SYSTEMS.items() if find_spec(system.module)]
    played: dict[str, list[Round]] = {name: [] for name in systems}
    with ExitStack() as stack:
        fleets = {
            name: stack.enter_context(Fleet(name, _SYSTEMS[name].module, _PEERS))
            for name in systems
        }
        for name, fleet in fleets.items():
            progress(f"{name}: starting {_PEERS} peers")
            fleet.start(numel=scale.numel, seed=seed, **_SYSTEMS[name].start)
        rounds = iter(range(scale.warm_up + scale.measured + _SPARE_ROUNDS))
        while any(len(_good(done, scale)) < scale.measured for done in played.values()):
            round_ = next(rounds, None)
            if round_ is None:
                break
            for name, fleet in fleets.items():
                one = play(fleet, _SYSTEMS[name].error_max, round_)
                played[name].append(one)
                progress(_story(name, one, warm_up=round_ < scale.warm_up))
    return Result(
        rows=[row for name in systems for row in _rows(name, played[name], scale)],
        bars=_bars(played, scale),
        notes=_notes(played, scale, seed),
    )


def play(fleet: Fleet, error_max: float, round_: int) -> Round:
    """One round of one system, verified at every peer."""
    fleet.ask("prepare", _STEP_TIMEOUT_S, number=round_)
    gather = fleet.timed("gather", _STEP_TIMEOUT_S, number=round_)
    if lost := _failures(gather):
        fleet.ask("cancel", _STEP_TIMEOUT_S, number=round_)
        return Round(round_, gather, None, [], lost)
    average = fleet.timed("average", _STEP_TIMEOUT_S, number=round_)
    checks = [Check(**facts) for facts in fleet.ask("verify", _STEP_TIMEOUT_S, number=round_)]
    unaware = [
        f"peer {index} was told of success and holds no mean (error {check.error:.2g})"
        for index, check in enumerate(checks)
        if not check.error <= error_max
    ]
    return Round(round_, gather, average, checks, _failures(average) or "; ".join(unaware))


def _failures(took: Took) -> str:
    return "; ".join(
        f"peer {index}: {reply['failure']}"
        for index, reply in enumerate(took.replies)
        if reply.get("failure")
    )


def _good(done: list[Round], scale: _Scale) -> list[Round]:
    """The measured rounds whose every result is the true mean."""
    return [one for one in done if one.round >= scale.warm_up and not one.failure]


def _rows(name: str, done: list[Round], scale: _Scale) -> list[dict[str, Cell]]:
    rows = [_row(name, str(one.round), [one]) for one in done if one.round >= scale.warm_up]
    good = _good(done, scale)
    return [*rows, _row(name, "median", good)] if good else rows


def _row(name: str, label: str, rounds: list[Round]) -> dict[str, Cell]:
    checks = [check for one in rounds for check in one.checks]
    averages = [one.average for one in rounds if one.average]
    return {
        "system": name,
        "round": label + " (wrong)" * any(one.failure for one in rounds),
        "s": median(one.seconds for one in rounds),
        "CPU-s": median(one.cpu_s for one in rounds),
        "s, all": median(one.gather.seconds + one.seconds for one in rounds),
        "CPU-s, all": median(one.gather.cpu_s + one.cpu_s for one in rounds),
        "error": max((check.error for check in checks), default=None),
        "of mean": max((check.error_of_mean for check in checks), default=None),
        "worst": max((check.error_max for check in checks), default=None),
        "same bits": "yes" if all(one.identical for one in rounds) else "no",
        "others": f"{median(took.others for took in averages):.0%}" if averages else None,
    }


def _bars(played: dict[str, list[Round]], scale: _Scale) -> list[Bar]:
    reference = _good(played[_REFERENCE], scale)
    against = f"{_REFERENCE}'s all-reduce without its matchmaking, median of {len(reference)}"
    bars: list[Bar] = []
    for name in (_OURS, _OURS_8_BIT):
        ours = played.get(name, [])
        good = _good(ours, scale)
        seconds: float | None = None
        cpu_s: float | None = None
        if good and reference:
            seconds = median(o.seconds for o in good) / median(o.seconds for o in reference)
            cpu_s = median(o.cpu_s for o in good) / median(o.cpu_s for o in reference)
        counted = [one for one in ours if one.round >= scale.warm_up]
        bars += [
            Bar.at_most(f"{name}: seconds, ours / theirs", seconds, 0.5, against),
            Bar.at_most(f"{name}: CPU-seconds, ours / theirs", cpu_s, 0.5, against),
            Bar.at_most(
                f"{name}: worst error on any peer, any round, any piece",
                max((one.error for one in ours), default=None),
                _SYSTEMS[name].error_max,
                "true mean in float64; rms of the error / rms of the contributions",
            ),
            Bar.at_least(
                f"{name}: rounds in which every peer had the mean",
                len(good) / len(counted) if counted else None,
                1.0,
                f"{_REFERENCE}: {_share(played[_REFERENCE])}, warm-up included",
            ),
        ]
    return bars


def _share(done: list[Round]) -> str:
    return f"{sum(not one.failure for one in done)} of {len(done)} rounds"


def _notes(played: dict[str, list[Round]], scale: _Scale, seed: int) -> list[str]:
    setting = (
        f"Seed {seed}; {_PEERS} peers of {scale.numel:,} float32 values, standard normal, fresh in "
        f"every round; {scale.warm_up} warm-up round before these; one compute thread per process."
    )
    clocks = (
        "s: from the word go until the last peer had answered. CPU-s: of all processes of all "
        "peers, daemons and helpers included. s and CPU-s, all: with the gathering before it "
        "(matchmaking, no tensor moves). others: what everyone else used of the cores meanwhile."
    )
    errors = (
        "Against the true mean, on the worst peer. error: the worst of the pieces of 65,536 "
        "values, over the rms of the contributions (wrong: more than its codec allows, or a failed "
        "round; not counted). of mean: all values, over the rms of the mean. worst: the single "
        "worst value, over the rms of the mean. same bits: on all peers."
    )
    notes = [setting, clocks, errors]
    notes += [
        f"{name}, round {one.round}: {one.failure}."
        for name, done in played.items()
        for one in done
        if one.failure
    ]
    others = [one.average.others for done in played.values() for one in done if one.average]
    if others and median(others) > _QUIET:
        notes.append(
            f"The machine was busy: others used {median(others):.0%} of the cores. Then seconds "
            "favour whoever runs more processes at once (hivemind: 12, ours: 8), because the "
            "scheduler shares by process; CPU-seconds suffer little. Measure again when quiet."
        )
    if _OURS not in played:
        notes.append(f"Only the reference ran: {_SYSTEMS[_OURS].module} does not exist yet.")
    return notes


def _story(name: str, one: Round, *, warm_up: bool) -> str:
    story = (
        f"{name} round {one.round}{' (warm-up)' * warm_up}: {one.seconds:.2f} s and "
        f"{one.cpu_s:.2f} CPU-s after {one.gather.seconds:.2f} s of gathering, "
        f"error {one.error:.1e}"
    )
    return f"{story}; {one.failure}" if one.failure else story
