"""Averaging 5 M float32 parameters among 8 peers on two continents, against hivemind.

Two regions of four in `tests/netlab`: 4 ms inside, 80 ms between, thin lines between the regions
and ten times that inside, cubic. Both systems run in the same kind of laboratory, one after the
other.

This is ours as one group of eight, which the two regions share. It is not yet the way that is meant
for such a place, a group in each region and gossip between them. A span that closes without a slow
member names those who are inside and keeps the rest for later; here such a round counts as wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Final

from tests.bench import wan_rounds as rounds
from tests.bench.result import Bar, Progress, Result
from tests.bench.wan_rounds import OURS, REFERENCE, SYSTEMS, Played


@dataclass(frozen=True, slots=True)
class _Setting:
    """A line across regions, and how much faster than the reference we must be on it."""

    mbps: float
    factor: float

    @property
    def words(self) -> str:
        return f"{self.mbps:g} Mbit/s"


_SETTINGS: Final = (_Setting(20, 10), _Setting(10, 10), _Setting(100, 5))


@dataclass(frozen=True, slots=True)
class _Scale:
    numel: int
    warm_up: int
    measured: int
    settings: tuple[_Setting, ...]


_FULL: Final = _Scale(5_000_000, 1, 5, _SETTINGS)
_QUICK: Final = _Scale(500_000, 1, 1, _SETTINGS[:1])


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. Some ten minutes; quick: one or two."""
    scale = _QUICK if quick else _FULL
    played = [one for setting in scale.settings for one in _setting(setting, scale, seed, progress)]
    counted = [one for one in played if one.round.round >= scale.warm_up]
    way = (
        f"{scale.warm_up} warm-up round before these. Ours is one group of eight across both "
        "regions, not yet two groups that gossip."
    )
    return Result(
        rows=[
            rounds.row(rounds.of(counted, setting.words, name))
            for setting in scale.settings
            for name in SYSTEMS
        ],
        bars=[bar for setting in scale.settings for bar in _bars(setting, counted)],
        notes=[rounds.lines(scale.numel, seed), rounds.COLUMNS, way, *rounds.troubles(played)],
    )


def _setting(setting: _Setting, scale: _Scale, seed: int, progress: Progress) -> list[Played]:
    played = []
    for name, system in SYSTEMS.items():
        with (
            rounds.laboratory(setting.mbps, seed) as lab,
            rounds.crew(
                lab, name, system.module, progress, numel=scale.numel, seed=seed, **system.start
            ) as fleet,
        ):
            for number in range(scale.warm_up + scale.measured):
                one = rounds.play_in(lab, fleet, setting.words, name, number)
                played.append(one)
                progress(rounds.told(one))
    return played


def _bars(setting: _Setting, counted: list[Played]) -> list[Bar]:
    at = setting.words
    ours, theirs = (rounds.of(counted, at, name) for name in (OURS, REFERENCE))
    good, good_theirs = rounds.right(ours), rounds.right(theirs)
    across = None
    if good and good_theirs:
        across = mean(o.across_mb for o in good) / mean(o.across_mb for o in good_theirs)
    against = f"{REFERENCE}, Float16, median of {len(good_theirs)} right rounds"
    times = rounds.ratio(rounds.seconds(theirs), rounds.seconds(ours))
    return [
        Bar.at_least(f"{at}: times as fast, gathering included", times, setting.factor, against),
        Bar.at_most(f"{at}: bytes across regions, ours / theirs", across, 1 / 20, against),
        rounds.all_right(at, counted),
    ]
