"""Which outer settings the learning table uses, and what the others of the grid give.

Flat DiLoCo and groups that gossip, at every H of `learning_groups`, on a seed that the table does
not use. The settings in use must be as good as the grid's best.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Final

from tests.bench import machine
from tests.bench.kept import Kept, run_all
from tests.bench.learning_groups import HS, INNER_LR, NEAR, OUTER, QUICK, QUICK_H, in_rounds
from tests.bench.result import Bar, Cell, Progress, Result
from tests.bench.trial import Size, Trial

_RATES: Final = (0.7, 1.0)
_MOMENTA: Final = (0.0, 0.5, 0.7, 0.9)
_TITLES: Final = {
    "flat": "flat DiLoCo, fp32",
    "groups": "groups + gossip, q4, rounds of H",
    "near": f"groups + gossip, q4, rounds of {NEAR}",
}
_TIE: Final = 1.002
"""Two settings whose losses are nearer than this cannot be told apart on one seed."""


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. Twenty minutes on two idle cores; quick: seconds."""
    size, hs = (QUICK, (QUICK_H,)) if quick else (Size(), HS)
    momenta = _MOMENTA[:1] if quick else _MOMENTA
    kept = Kept(machine.ROOT / ".bench" / ("learning-tuning-quick" if quick else "learning-tuning"))
    plain = Trial(way="ddp", seed=seed, inner_lr=INNER_LR, size=size)
    kinds = tuple(OUTER)
    grid = {
        (kind, h, lr, momentum): replace(
            in_rounds(plain, "flat" if kind == "flat" else "gossip", kind, h),
            outer_lr=lr, momentum=momentum,
        )
        for kind, h, lr, momentum in itertools.product(kinds, hs, _RATES, momenta)
    }  # fmt: skip
    outcomes = run_all(list(grid.values()), kept, progress)
    losses = {key: outcomes[trial].loss for key, trial in grid.items()}
    rows: list[dict[str, Cell]] = []
    for kind, h, lr in itertools.product(kinds, hs, _RATES):
        row: dict[str, Cell] = {"way": _TITLES[kind], "H": h, "outer lr": f"{lr:g}"}
        for momentum in momenta:
            mark = " *" * (OUTER[kind].get(h) == (lr, momentum))
            row[f"momentum {momentum:g}"] = f"{losses[kind, h, lr, momentum]:.4f}{mark}"
        rows.append(row)
    bars = []
    for kind, h in itertools.product(kinds, hs):
        best = min(loss for key, loss in losses.items() if key[:2] == (kind, h))
        used = losses.get((kind, h, *OUTER[kind].get(h, (_RATES[0], momenta[0]))))
        bars.append(
            Bar.at_most(
                f"tuning: {_TITLES[kind]}, H = {h}: the settings in use / the best",
                None if used is None else used / best, _TIE, "nearer is the same on one seed",
            )
        )  # fmt: skip
    kept.forget()
    note = (
        f"Seed {seed}. Validation losses, nats per byte, after {size.steps} steps with an inner "
        f"rate of {INNER_LR:g}; all else as with `learning --part groups`. *: in use there."
    )
    return Result(rows, bars, [note])
