"""Finetuning without gradients: DeComFL and FedKSeed against centralised MeZO with equal steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Final

from tests.bench.finetune_arms import Arm, Row, base_of, by_seed, kept_of, train_all
from tests.bench.finetune_trial import Size
from tests.bench.result import Bar, Progress, Result

PART: Final = "zeroth"
SIZE: Final = Size(
    batch=1, rounds=18, steps=1, perturbations=16, rank=2, targets=("q_proj", "v_proj")
)
QUICK: Final = Size(batch=1, rounds=2, steps=1, perturbations=4, rank=2, targets=("v_proj",))
RATES: Final = (3e-3, 1e-2, 3e-2)
ONE_RATES: Final = (1e-4, 3e-4, 1e-3)
"""Of steps along one direction: there are P times as many of them. Thrice the largest is best after
half of the rounds, and runs away before the end, centralised or not."""
KSEED_ROUNDS: Final = 4
"""FedKSeed's rounds for each of DeComFL's, of so many times fewer passes, where peers make several
local steps."""
_DECOMFL_BYTES_MAX: Final = 100
_KSEED_BYTES_MAX: Final = 16_400
_SHARE_MIN: Final = 0.95


def run(quick: bool, seed: int, progress: Progress, data: Path | None = None) -> Result:
    """See `registry.Measurement`."""
    result = measure(quick, seed, progress, data)
    kept_of(PART, quick).forget()
    return result


def arms(size: Size) -> list[Arm]:
    """The table's rows."""
    each = replace(size, rounds=size.perturbations * size.rounds, perturbations=1)
    several = replace(
        each, rounds=KSEED_ROUNDS * size.rounds,
        steps=size.steps * size.perturbations // KSEED_ROUNDS,
    )  # fmt: skip
    return [
        Arm(way="untrained", title="the base as it is", rates=(1.0,), size=size),
        Arm(
            way="pooled mezo", title=f"centralised MeZO, P = {size.perturbations}", rates=RATES,
            size=size,
        ),
        Arm(way="decomfl", title=f"DeComFL, P = {size.perturbations}", rates=RATES, size=size),
        Arm(
            way="pooled mezo, P = 1", title="centralised MeZO, P = 1", rates=ONE_RATES, size=each
        ),
        Arm(way="kseed", title="FedKSeed, pool of 4096", rates=ONE_RATES, size=each),
        Arm(
            way="kseed, several", title=f"FedKSeed, {several.steps} local steps a round",
            rates=ONE_RATES, size=several,
        ),
    ]  # fmt: skip


def measure(quick: bool, seed: int, progress: Progress, data: Path | None = None) -> Result:
    """As `run`, and its outcomes stay kept."""
    base = base_of(data, quick, progress)
    size = QUICK if quick else SIZE
    rows = train_all(arms(size), base, seed, quick, kept_of(PART, quick), progress)
    p = size.perturbations
    note = (
        f"Zeroth order, {size.batch} samples a step: DeComFL in {size.rounds} rounds of a step"
        f" along {p} directions, FedKSeed in {p * size.rounds} of a step along one (and once more"
        f" in {KSEED_ROUNDS * size.rounds} of {p // KSEED_ROUNDS} local steps), so by as many"
        " passes of the model. Adapters"
        f" are of rank {size.rank} on {', '.join(size.targets)}. Centralised MeZO"
        f" makes as many steps of as many directions, each on {8 * size.batch} samples (with P ="
        f" {p} along DeComFL's directions). Gain: the untrained base's loss less the trained one's."
        " It is small because the steps are few, and no sign of what zeroth order can do."
    )
    return Result([row.cells({}) for row in rows.values()], bars(rows), [note])


def bars(rows: dict[str, Row]) -> list[Bar]:
    """The gain, and what it costs."""
    base = rows["untrained"].losses()
    gains = {
        way: [before - after for before, after in zip(base, row.losses(), strict=True)]
        for way, row in rows.items()
    }
    found = []
    for way, rival, words, most in (
        ("decomfl", "pooled mezo", "DeComFL", _DECOMFL_BYTES_MAX),
        ("kseed", "pooled mezo, P = 1", "FedKSeed", _KSEED_BYTES_MAX),
    ):
        pooled = gains[rival]
        share = fmean(gains[way]) / fmean(pooled) if fmean(pooled) > 0 else None
        sent = max(max(outcome.sent_bytes) for outcome in rows[way].outcomes)
        found += [
            Bar.at_least(
                f"zeroth order, {words}: gain over the base / centralised MeZO's",
                share, _SHARE_MIN,
                f"nats per token {by_seed(gains[way])}; centralised {by_seed(pooled)}",
            ),
            Bar.at_most(
                f"zeroth order, {words}: bytes up per peer and round",
                sent, most, "the largest entry, signature and all",
            ),
        ]  # fmt: skip
    return found
