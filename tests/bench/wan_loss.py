"""Averaging among 8 peers on two continents while packets are lost between them.

100 Mbit/s between the regions, with 0.1, 1 and 3 % of the packets lost at random, each way. The
hosts have cubic, as volunteers' machines do; the bulk lane asks for BBR for its own sockets, which
this kernel grants to everybody. Both systems play a few rounds without loss first, in the same
laboratory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tests.bench import wan_rounds as rounds
from tests.bench.result import Bar, Progress, Result
from tests.bench.wan_rounds import OURS, REFERENCE, SYSTEMS, Played

_MBPS: Final = 100.0
_FACTOR: Final = 10.0
_SLOWER_MAX: Final = 1.5


@dataclass(frozen=True, slots=True)
class _Scale:
    numel: int
    losses: tuple[float, ...]
    measured: dict[str, int]
    """Rounds at each loss. The reference takes up to 40 s for one, or a minute for none."""


_WARM_UP: Final = 2
_FULL: Final = _Scale(5_000_000, (0.0, 0.001, 0.01, 0.03), {REFERENCE: 3, OURS: 10})
_QUICK: Final = _Scale(500_000, (0.0, 0.01), {REFERENCE: 1, OURS: 3})


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. Some eight minutes, most of them the reference's."""
    scale = _QUICK if quick else _FULL
    played: list[Played] = []
    for name in SYSTEMS:
        played += _play(name, scale, seed, progress)
    counted = [one for one in played if one.round.round >= _WARM_UP]
    lost = (
        "Lost: of the packets between the regions, at random, each way. The bulk lane asked for "
        "BBR on its sockets and got it; everything else is cubic."
    )
    return Result(
        rows=[
            rounds.row(rounds.of(counted, words(loss), name))
            for loss in scale.losses
            for name in SYSTEMS
        ],
        bars=[bar for loss in scale.losses[1:] for bar in _bars(loss, counted)],
        notes=[
            rounds.lines(scale.numel, seed),
            rounds.COLUMNS,
            lost,
            *rounds.troubles(played),
        ],
    )


def words(loss: float) -> str:
    return f"{_MBPS:g} Mbit/s, {100 * loss:g} % lost"


def _play(name: str, scale: _Scale, seed: int, progress: Progress) -> list[Played]:
    played: list[Played] = []
    system = SYSTEMS[name]
    with (
        rounds.laboratory(_MBPS, seed) as lab,
        rounds.crew(
            lab, name, system.module, progress, numel=scale.numel, seed=seed, **system.start
        ) as fleet,
    ):
        for loss in scale.losses:
            lab.set_route("a", "b", loss=loss)
            warm_up = _WARM_UP if not played else 0
            for _ in range(warm_up + scale.measured[name]):
                one = rounds.play_in(lab, fleet, words(loss), name, len(played))
                played.append(one)
                progress(rounds.told(one))
    return played


def _bars(loss: float, counted: list[Played]) -> list[Bar]:
    at = words(loss)
    ours, theirs = (rounds.of(counted, at, name) for name in (OURS, REFERENCE))
    clean = rounds.seconds(rounds.of(counted, words(0.0), OURS))
    good_theirs = rounds.right(theirs)
    against = f"{REFERENCE}, Float16, median of {len(good_theirs)} right rounds"
    reference_s = rounds.seconds(theirs)
    if reference_s is None and theirs:
        reference_s = min(one.seconds for one in theirs)
        against = f"{REFERENCE}, Float16: none of its {len(theirs)} rounds was right; the quickest"
    times = rounds.ratio(reference_s, rounds.seconds(ours))
    slower = rounds.ratio(rounds.seconds(ours), clean)
    return [
        Bar.at_least(f"{at}: times as fast, gathering included", times, _FACTOR, against),
        Bar.at_most(f"{at}: our time / that without loss", slower, _SLOWER_MAX, "same run"),
        rounds.all_right(at, counted),
    ]
