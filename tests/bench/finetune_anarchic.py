"""Anarchic finetuning, arrivals skewed 7:1:1:1: AFA-CS against AFA-CD on the rare peers' tasks."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Final

from tests.bench.finetune_arms import Arm, Row, base_of, by_seed, kept_of, train_all
from tests.bench.finetune_others import ARRIVALS, LOCAL_STEPS_MAX, PER_STEP, WORKER_TASKS
from tests.bench.finetune_trial import Size
from tests.bench.result import Bar, Progress, Result

PART: Final = "anarchic"
SIZE: Final = Size(batch=1, rounds=200, rank=8)
QUICK: Final = Size(batch=1, rounds=8, rank=4)
RATES: Final = (0.03, 0.1, 0.3)
_RATIO_MAX: Final = 0.99  # better by more than a rounding
OFTEN: Final = tuple(range(WORKER_TASKS))
RARE: Final = tuple(range(WORKER_TASKS, WORKER_TASKS * len(ARRIVALS)))


def run(quick: bool, seed: int, progress: Progress, data: Path | None = None) -> Result:
    """See `registry.Measurement`."""
    result = measure(quick, seed, progress, data)
    kept_of(PART, quick).forget()
    return result


def arms(size: Size) -> list[Arm]:
    """The table's rows. Each rule's rate is the best for the rare peers."""
    return [
        Arm(way="untrained", title="the base as it is", rates=(1.0,), size=size),
        Arm(way="afa-cs", title="AFA-CS", rates=RATES, size=size, tuned_on=RARE),
        Arm(way="afa-cd", title="AFA-CD", rates=RATES, size=size, tuned_on=RARE),
    ]


def measure(quick: bool, seed: int, progress: Progress, data: Path | None = None) -> Result:
    """As `run`, and its outcomes stay kept."""
    base = base_of(data, quick, progress)
    size = QUICK if quick else SIZE
    rows = train_all(arms(size), base, seed, quick, kept_of(PART, quick), progress)
    note = (
        f"Anarchic: four workers with {WORKER_TASKS} tasks each; {size.rounds} arrivals in all,"
        f" each after 1 to {LOCAL_STEPS_MAX} steps of plain SGD on {WORKER_TASKS * size.batch}"
        " samples from the values that the worker pulled at its last arrival; a common step for"
        f" every {PER_STEP} arrivals, of the same length with both rules. Updates are kept and sent"
        " as the product's table does, at 8 bits a value. Rates are chosen by the rare peers' loss."
    )
    groups = {"the frequent peer's": OFTEN, "the rare ones'": RARE}
    return Result([row.cells(groups) for row in rows.values()], bars(rows), [note])


def bars(rows: dict[str, Row]) -> list[Bar]:
    """On the rare peers' tasks."""
    both = (rows[way].losses(RARE) for way in ("afa-cs", "afa-cd"))
    ratios = [mine / its for mine, its in zip(*both, strict=True)]
    return [
        Bar.at_most(
            "anarchic, arrivals 7:1:1:1: AFA-CS's loss on the rare peers' tasks / AFA-CD's",
            fmean(ratios), _RATIO_MAX, by_seed(ratios),
        )
    ]  # fmt: skip
