"""Peers of rank 16, of rank 4 and without gradients, where only the weak ones hold some tasks.

Against a run of the strong ones alone, on the tasks that these have never seen.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Final

from tests.bench.finetune_arms import Arm, Row, base_of, by_seed, kept_of, train_all
from tests.bench.finetune_trial import Size
from tests.bench.finetune_worker import RANK_4, STRONG, ZEROTH
from tests.bench.result import Bar, Progress, Result

PART: Final = "kinds"
SIZE: Final = Size(batch=1, rounds=4, steps=20, rank=16, perturbations=8)
QUICK: Final = Size(batch=1, rounds=2, steps=2, rank=16, perturbations=2)
RATES: Final = (1e-3, 3e-3, 1e-2)
_RATIO_MAX: Final = 0.99  # better by more than seeds differ
_GROUPS: Final = {"tasks of rank 16": STRONG, "of rank 4": RANK_4, "without gradients": ZEROTH}


def run(quick: bool, seed: int, progress: Progress, data: Path | None = None) -> Result:
    """See `registry.Measurement`."""
    result = measure(quick, seed, progress, data)
    kept_of(PART, quick).forget()
    return result


def arms(size: Size) -> list[Arm]:
    """The table's rows."""
    return [
        Arm(way="untrained", title="the base as it is", rates=(1.0,), size=size),
        Arm(way="three kinds", title="rank 16, rank 4, zeroth order", rates=RATES, size=size),
        Arm(way="rank 16 alone", title="rank 16 alone", rates=RATES, size=size),
    ]


def measure(quick: bool, seed: int, progress: Progress, data: Path | None = None) -> Result:
    """As `run`, and its outcomes stay kept."""
    base = base_of(data, quick, progress)
    size = QUICK if quick else SIZE
    rows = train_all(arms(size), base, seed, quick, kept_of(PART, quick), progress)
    note = (
        f"Kinds: {len(STRONG)} peers of rank 16, {len(RANK_4)} of rank 4 and {len(ZEROTH)} of"
        f" zeroth order ({size.perturbations} directions a step of rank 2) with a task each;"
        f" {size.rounds} rounds of {size.steps} steps of {size.batch} samples. Peers without"
        " gradients count P / (100 + P) of their tokens (`method.effective_dim`) and step by 0.01"
        " (`method.seeds_lr`), both the manifest's defaults; the rates are the others'."
    )
    return Result([row.cells(_GROUPS) for row in rows.values()], bars(rows), [note])


def bars(rows: dict[str, Row]) -> list[Bar]:
    """On what the strong ones never saw."""
    found = []
    for name, of in (("the weak peers'", RANK_4 + ZEROTH), ("the zeroth-order peers'", ZEROTH)):
        both = (rows[way].losses(of) for way in ("three kinds", "rank 16 alone"))
        ratios = [mine / its for mine, its in zip(*both, strict=True)]
        found.append(
            Bar.at_most(
                f"hybrid: loss on {name} tasks / rank 16 alone",
                fmean(ratios), _RATIO_MAX, by_seed(ratios),
            )
        )  # fmt: skip
    return found
