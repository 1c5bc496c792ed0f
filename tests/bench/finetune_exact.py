"""LoRA under drift: exact averages of products against FedIT's of factors, and pooled data.

Eight peers with a task each make 50 AdamW steps between rounds; centralised LoRA makes as many
steps, each on everybody's samples. Exact twice: as `lora` runs do it, cut at the peers' own rank,
and as `hybrid` runs can, in a common state that has room for all that eight peers send.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Final

from tests.bench.finetune_arms import Arm, Row, base_of, by_seed, kept_of, train_all
from tests.bench.finetune_trial import Size
from tests.bench.finetune_worker import ROOM, SPREAD
from tests.bench.result import Bar, Progress, Result

PART: Final = "exact"
SIZE: Final = Size(batch=1, rounds=4, steps=50, rank=4)
QUICK: Final = Size(batch=1, rounds=2, steps=3, rank=1)
RATES: Final = (1e-3, 3e-3, 1e-2)


def run(quick: bool, seed: int, progress: Progress, data: Path | None = None) -> Result:
    """See `registry.Measurement`."""
    result = measure(quick, seed, progress, data)
    kept_of(PART, quick).forget()
    return result


def arms(size: Size) -> list[Arm]:
    """The table's rows."""
    return [
        Arm(way="untrained", title="the base as it is", rates=(1.0,), size=size),
        Arm(way="pooled", title="centralised LoRA, pooled data", rates=RATES, size=size),
        Arm(
            way="exact, whole", title="exact, room for all ranks", rates=RATES,
            size=replace(size, rank=8 * size.rank),
        ),
        Arm(
            way="exact, spread", title="exact, spread against drift", rates=RATES,
            size=replace(size, rank=ROOM * size.rank),
        ),
        Arm(way="exact", title="exact, cut at the peers' rank", rates=RATES, size=size),
        Arm(way="fedit", title="FedIT: mean of factors", rates=RATES, size=size),
    ]  # fmt: skip


def measure(quick: bool, seed: int, progress: Progress, data: Path | None = None) -> Result:
    """As `run`, and its outcomes stay kept."""
    base = base_of(data, quick, progress)
    size = QUICK if quick else SIZE
    rows = train_all(arms(size), base, seed, quick, kept_of(PART, quick), progress)
    note = (
        f"Exact: K = {size.steps} local AdamW steps of {size.batch} samples, {size.rounds} rounds,"
        f" rank {size.rank} for each peer on all linear layers. Centralised LoRA of that rank makes"
        f" as many steps ({size.rounds * size.steps}) on {8 * size.batch} samples: equal tokens."
        f" 'Room for all ranks': a common state of rank {8 * size.rank}, which peers hold beside"
        " the base and send changes of their own rank to; they upload the same. 'Spread': the state"
        f" has twice that rank, and takes the mean change {SPREAD['step']:g} times, its singular"
        f" values raised to the power {SPREAD['spectrum']:g} at the same norm (`method.spectrum`,"
        " `method.step`)."
    )
    return Result([row.cells({}) for row in rows.values()], bars(rows), [note])


def bars(rows: dict[str, Row]) -> list[Bar]:
    """The gap that is left of FedIT's."""
    pooled, fedit = rows["pooled"].losses(), rows["fedit"].losses()
    theirs = [its - best for its, best in zip(fedit, pooled, strict=True)]
    found = []
    for way in ("exact, spread", "exact, whole", "exact"):
        gaps = [mine - best for mine, best in zip(rows[way].losses(), pooled, strict=True)]
        ratio = fmean(gaps) / fmean(theirs) if fmean(theirs) > 0 else None
        found.append(
            Bar.at_most(
                f"K = 50, {rows[way].arm.title}: gap to centralised / FedIT's gap",
                ratio, 0.5, f"nats per token {by_seed(gaps)}; FedIT {by_seed(theirs)}",
            )
        )  # fmt: skip
    return found
