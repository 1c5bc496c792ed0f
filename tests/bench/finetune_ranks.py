"""LoRA of ranks 2, 4, 8 and 16 in one run: against rank 2 for all, HetLoRA, and itself in q4.

Every peer holds the whole common state, of rank 16, and sends a change of its own rank.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Final

from tests.bench.finetune_arms import Arm, Row, base_of, by_seed, kept_of, train_all
from tests.bench.finetune_trial import Size
from tests.bench.finetune_worker import RANKS
from tests.bench.result import Bar, Progress, Result

PART: Final = "ranks"
SIZE: Final = Size(batch=1, rounds=4, steps=20, rank=16)
QUICK: Final = Size(batch=1, rounds=2, steps=2, rank=16)
RATES: Final = (3e-3, 1e-2, 3e-2)
_HEAD_RATIO_MAX: Final = 1.1  # headers and frames beside the values


def run(quick: bool, seed: int, progress: Progress, data: Path | None = None) -> Result:
    """See `registry.Measurement`."""
    result = measure(quick, seed, progress, data)
    kept_of(PART, quick).forget()
    return result


def arms(size: Size) -> list[Arm]:
    """The table's rows."""
    return [
        Arm(way="mixed ranks", title="ranks 2, 4, 8, 16", rates=RATES, size=size),
        Arm(way="mixed ranks, q4", title="the same, q4", rate_of="mixed ranks", size=size),
        Arm(way="all rank 2", title="rank 2 for all", rates=RATES, size=size),
        Arm(way="hetlora", title="HetLoRA, ranks 2, 4, 8, 16", rates=RATES, size=size),
    ]


def measure(quick: bool, seed: int, progress: Progress, data: Path | None = None) -> Result:
    """As `run`, and its outcomes stay kept."""
    base = base_of(data, quick, progress)
    size = QUICK if quick else SIZE
    rows = train_all(arms(size), base, seed, quick, kept_of(PART, quick), progress)
    ranks = (
        f"Ranks: {size.rounds} rounds of {size.steps} AdamW steps of {size.batch} samples; two"
        f" peers of each rank; a common state of rank {size.rank} in all rows but HetLoRA's, whose"
        " state is its factors. HetLoRA: zero padding and sparsity weights; nobody prunes its rank,"
        " since that is what the machine can do. Bytes are those of factors, in float32 but for"
        " q4."
    )
    noise = (
        "Seed noise is the sample standard deviation, over the seeds, of the uncompressed run's"
        " loss; what q4 costs is the mean over the seeds of (loss in q4 - loss in float32), both"
        " with the same seed. q4 may also be better, by any amount."
    )
    return Result([row.cells({}) for row in rows.values()], bars(rows), [ranks, noise])


def bars(rows: dict[str, Row]) -> list[Bar]:
    """Ranks that differ, and the codec."""
    mixed, coded, low, het = (
        rows[way].losses() for way in ("mixed ranks", "mixed ranks, q4", "all rank 2", "hetlora")
    )

    def ratio(theirs: list[float]) -> list[float]:
        return [mine / its for mine, its in zip(mixed, theirs, strict=True)]

    sent = rows["mixed ranks"].outcomes[0].sent_bytes
    per_rank = [bytes_ / rank for bytes_, rank in zip(sent, RANKS, strict=True)]
    cost = [mine - plain for mine, plain in zip(coded, mixed, strict=True)]
    return [
        Bar.at_most(
            "ranks 2, 4, 8, 16 mixed: loss / all at rank 2",
            fmean(ratio(low)), 1.0, by_seed(ratio(low)),
        ),
        Bar.at_most(
            "ranks 2, 4, 8, 16 mixed: loss / HetLoRA's",
            fmean(ratio(het)), 1.0, by_seed(ratio(het)),
        ),
        Bar.at_most(
            "ranks mixed: bytes up per rank, rank 2 / rank 16",
            max(per_rank) / per_rank[RANKS.index(16)], _HEAD_RATIO_MAX,
            "1: a peer pays its own rank and nothing else; largest of all peers",
        ),
        Bar.at_most(
            "q4 on low-rank contributions: loss added / seed noise",
            fmean(cost) / stdev(mixed), 1.0,
            f"added, nats per token, {by_seed(cost)}; noise {stdev(mixed):.2g}",
        ),
    ]  # fmt: skip
