"""Which outer settings the learning table uses, and what those beside them give.

Flat DiLoCo and groups that gossip, at every H of `learning_groups`, on a seed that the table does
not use. From the settings in use the search goes to the best of their neighbours on a grid, and on
until none is better. Those in use must be as good as where it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from tests.bench import machine
from tests.bench.kept import LEARNING, Kept, run_all
from tests.bench.learning_groups import HS, INNER_LR, NEAR, OUTER, QUICK, QUICK_H, in_rounds
from tests.bench.result import Bar, Cell, Progress, Result
from tests.bench.trial import Size, Trial

_RATES: Final = (0.5, 0.7, 1.0, 1.4)
_MOMENTA: Final = (0.0, 0.5, 0.7, 0.9)
_TITLES: Final = {
    "flat": "flat DiLoCo, fp32",
    "near": f"groups + gossip, q4, rounds of {NEAR}",
}
Setting = tuple[float, float]
"""Outer rate and momentum."""

_TIE: Final = 1.002
"""Two settings whose losses are nearer than this cannot be told apart on one seed."""


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. Twenty minutes on two idle cores; quick: seconds."""
    size, hs = (QUICK, (QUICK_H,)) if quick else (Size(), HS)
    name = "learning-tuning-quick" if quick else "learning-tuning"
    kept = Kept(machine.ROOT / ".bench" / name, LEARNING)
    plain = Trial(way="ddp", seed=seed, inner_lr=INNER_LR, size=size)
    pairs = [(kind, h) for kind in OUTER for h in hs if quick or h in OUTER[kind]]
    used = {(kind, h): OUTER[kind].get(h, (1.0, 0.0)) for kind, h in pairs}
    found: dict[tuple[str, int], dict[Setting, float]] = {pair: {} for pair in pairs}
    centre = dict(used)
    while True:
        wanted = {
            (pair, setting): _trial(plain, *pair, setting)
            for pair in pairs
            for setting in (centre[pair], *_beside(centre[pair]))
            if setting not in found[pair]
        }
        if not wanted:
            break
        outcomes = run_all(list(wanted.values()), kept, progress)
        for (pair, setting), trial in wanted.items():
            found[pair][setting] = outcomes[trial].loss
        for pair in pairs if not quick else ():
            centre[pair] = min(found[pair], key=lambda setting: found[pair][setting])
    rows: list[dict[str, Cell]] = []
    for kind, h in pairs:
        for lr in _RATES:
            row: dict[str, Cell] = {"way": _TITLES[kind], "H": h, "outer lr": f"{lr:g}"}
            for momentum in _MOMENTA:
                loss = found[kind, h].get((lr, momentum))
                mark = " *" * (used[kind, h] == (lr, momentum))
                row[f"momentum {momentum:g}"] = None if loss is None else f"{loss:.4f}{mark}"
            rows.append(row)
    bars = [
        Bar.at_most(
            f"tuning: {_TITLES[kind]}, H = {h}: the settings in use / the best",
            found[kind, h][used[kind, h]] / min(found[kind, h].values()), _TIE,
            "nearer is the same on one seed",
        )
        for kind, h in pairs
    ]  # fmt: skip
    kept.forget()
    note = (
        f"Seed {seed}. Validation losses, nats per byte, after {size.steps} steps with an inner "
        f"rate of {INNER_LR:g}; all else as with `learning --part groups`. *: in use there. "
        "-: not tried, as the search never stood beside it."
    )
    return Result(rows, bars, [note])


def _trial(plain: Trial, kind: str, h: int, setting: Setting) -> Trial:
    way = "flat" if kind == "flat" else "gossip"
    lr, momentum = setting
    return replace(in_rounds(plain, way, kind, h), outer_lr=lr, momentum=momentum)


def _beside(setting: Setting) -> Iterator[Setting]:
    """Its neighbours on the grid."""
    rate, momentum = _RATES.index(setting[0]), _MOMENTA.index(setting[1])
    for r, m in (
        (rate - 1, momentum),
        (rate + 1, momentum),
        (rate, momentum - 1),
        (rate, momentum + 1),
    ):
        if 0 <= r < len(_RATES) and 0 <= m < len(_MOMENTA):
            yield _RATES[r], _MOMENTA[m]
