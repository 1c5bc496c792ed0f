"""Groups that gossip against one large group and synchronous DDP: the loss after equal tokens.

16 peers at 4 sites train one small language model (`trial`): everybody's gradient in every step
(DDP); one group of all 16 that averages pseudo-gradients in float32 (flat DiLoCo); and the
product's way, a group at each site and gossip between them, all in q4 and with short rounds, since
what groups send inside crosses no border. Bytes are those between sites. Flat DiLoCo is credited
with the cheapest all-reduce there is, and with its float32 coded without loss
(`mixing.Crossing.ring`): any real one sends more.

Inner settings are the product's defaults, the same for all; outer ones are tuned for each H
of flat DiLoCo, and once for groups (`learning_tuning`), on another seed. A full run also draws
docs/results/learning-groups.svg. It goes on where a killed one was (`kept`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Final

from tests.bench import machine, svg
from tests.bench.kept import LEARNING, Kept, run_all
from tests.bench.mixing import Crossing
from tests.bench.result import Bar, Cell, Progress, Result
from tests.bench.trial import PEERS, SITES, WAYS, Outcome, Size, Trial, crossed

INNER_LR: Final = 1e-3
"""`InnerSpec`'s default."""
GOSSIP_EVERY: Final = {10: 3, 25: 4, 100: 14}
"""By H, of flat DiLoCo's rounds: as often as a tenth of its bytes allows, where every group begins
mixes. First loans are dear, and a training in rounds of 100 has few others; which groups begin a
mix in it at all is drawn."""
OUTER: Final[Mapping[str, Mapping[int, tuple[float, float]]]] = {
    "near": {25: (1.4, 0.0)},
    "flat": {10: (0.7, 0.5), 25: (0.7, 0.5), 100: (1.0, 0.5)},
}
"""Outer rate and momentum by H: for groups, whose rounds have `NEAR` steps at every H (so the
middle one's serve for all), and for one group of all. `learning --part tuning` starts from them,
and says for each whether one beside it is better."""
HS: Final = tuple(OUTER["flat"])

QUICK: Final = Size(
    hidden=32, intermediate=64, layers=1, tokens=32, batch=1, steps=40, look_every=10,
    look_samples=16, last_samples=32,
)  # fmt: skip
QUICK_H: Final = 5

_SEEDS: Final = 3
_MIDDLE: Final = 25  # the H at which everything else is looked at
NEAR: Final = 2
"""Steps in a round inside a group whose peers are near."""
_KINDS: Final = (("flat", "flat"), ("gossip", "near"))
_LOSS_RATIO_MAX: Final = 1.01
_BYTES_RATIO_MAX: Final = 0.1
_PICTURE: Final = "learning-groups.svg"
_COLOURS: Final = {
    "ddp": "#57606a", "flat": "#0969da", "gossip": "#cf222e", "lossy": "#bc4c00", "none": "#8250df",
}  # fmt: skip

Table = Mapping[Trial, Sequence[Outcome]]
"""By the trial with the first seed: the outcomes of all seeds in order."""


def trials(seed: int, size: Size, hs: Sequence[int]) -> list[Trial]:
    """What one seed is trained with, in the table's order."""
    middle = _MIDDLE if _MIDDLE in hs else hs[0]
    plain = Trial(way="ddp", seed=seed, inner_lr=INNER_LR, size=size)
    found = [plain]
    for h in hs:
        found += [in_rounds(plain, *kind, h) for kind in _KINDS]
    found += [in_rounds(plain, way, "near", middle) for way in ("lossy", "none")]
    return list(dict.fromkeys(found))


def in_rounds(plain: Trial, way: str, kind: str, h: int) -> Trial:
    """`plain` with exchanges between sites as often as flat DiLoCo with rounds of `h` steps has
    them, or every few of them (`GOSSIP_EVERY`) if groups gossip. `kind`: a key of `OUTER`.
    """
    lr, momentum = OUTER[kind].get(h, OUTER[kind][_MIDDLE])
    steps = NEAR if kind == "near" else h
    mixes = 0 if way in ("flat", "none") else _every(h)
    return replace(plain, way=way, h=steps, outer_lr=lr, momentum=momentum, gossip_every=mixes)


def _every(h: int) -> int:
    """Rounds of a near group between two mixes."""
    return GOSSIP_EVERY.get(h, GOSSIP_EVERY[_MIDDLE]) * h // NEAR


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. Twenty minutes on two idle cores; quick: seconds."""
    size, hs = (QUICK, (QUICK_H,)) if quick else (Size(), HS)
    name = "learning-groups-quick" if quick else "learning-groups"
    kept = Kept(machine.ROOT / ".bench" / name, LEARNING)
    rows = trials(seed, size, hs)
    seeds = range(seed, seed + (2 if quick else _SEEDS))
    # Seed by seed: a run that is cut short has whole seeds.
    everything = [replace(row, seed=each) for each in seeds for row in rows]
    outcomes = run_all(everything, kept, progress)
    table = {row: [outcomes[replace(row, seed=each)] for each in seeds] for row in rows}
    notes = _notes(table, seeds)
    if not quick:
        picture = machine.ROOT / "docs" / "results" / _PICTURE
        picture.write_text(draw(table), "utf-8")
        notes.append(f"![Loss curves]({_PICTURE})")
    kept.forget()
    return Result([_row(row, table) for row in rows], _bars(table), notes)


def _rival(trial: Trial, table: Table, way: str) -> Trial:
    """The row of `way` under the same conditions."""
    wanted = (way, trial.shards, trial.inner_lr)
    fitting = [row for row in table if (row.way, row.shards, row.inner_lr) == wanted]
    wanted_h = next((h for h in HS if trial.gossip_every == _every(h)), _MIDDLE)
    return next((row for row in fitting if row.h == wanted_h), fitting[0])


def _ratios(trial: Trial, table: Table) -> list[float]:
    """Loss by loss / flat DiLoCo's with the same seed."""
    flat = table[_rival(trial, table, "flat")]
    return [mine.loss / its.loss for mine, its in zip(table[trial], flat, strict=True)]


def _row(trial: Trial, table: Table) -> dict[str, Cell]:
    mine = table[trial]
    losses = [one.loss for one in mine]
    row: dict[str, Cell] = {
        "way": WAYS[trial.way].title,
        "shards": trial.shards,
        "inner lr": f"{trial.inner_lr:g}",
        "H": str(trial.h or "-"),
        "outer": f"{trial.outer_lr:g} / {trial.momentum:g}" if trial.h else "-",
        "mix every": f"{trial.gossip_every} rounds" if trial.gossip_every else "-",
        "loss": f"{fmean(losses):.4f}",
        "± seeds": f"{stdev(losses):.4f}",
        "/ flat": "-",
        "of their mean": f"{fmean(one.mean_loss for one in mine):.4f}",
        "groups apart": f"{fmean(one.apart for one in mine):.3f}",
        "/ DDP": "-",
        "MB between sites": f"{fmean(crossed(trial, one) for one in mine) / 1e6:.2f}",
        "bytes / flat": "-",
    }
    if trial.shards == "iid" and trial.h:
        ddp = fmean(one.loss for one in table[_rival(trial, table, "ddp")])
        row["/ DDP"] = f"{fmean(losses) / ddp:.3f}"
    if trial.h and trial.way != "flat":
        row["/ flat"] = f"{fmean(_ratios(trial, table)):.4f}"
        row["bytes / flat"] = f"{_bytes_ratio(trial, table):.3f}"
    return row


def _bytes_ratio(trial: Trial, table: Table) -> float:
    rival = _rival(trial, table, "flat")
    flat = fmean(crossed(rival, one) for one in table[rival])
    return fmean(crossed(trial, one) for one in table[trial]) / flat


def _bars(table: Table) -> list[Bar]:
    found = []
    for row in table:
        if row.way not in ("gossip", "lossy") or row.shards != "iid" or row.inner_lr != INNER_LR:
            continue
        h = _rival(row, table, "flat").h
        name = f"learning: {WAYS[row.way].title}, rounds of {row.h}, against H = {h}"
        ratios = _ratios(row, table)
        each = ", ".join(f"{ratio:.4f}" for ratio in ratios)
        found += [
            Bar.at_most(
                f"{name}: loss / flat DiLoCo's, mean over seeds",
                fmean(ratios), _LOSS_RATIO_MAX, f"fp32, all 16 peers at once; by seed {each}",
            ),
            Bar.at_most(
                f"{name}: bytes between sites / flat DiLoCo's",
                _bytes_ratio(row, table), _BYTES_RATIO_MAX,
                "a ring among sites, float32 coded without loss",
            ),
        ]  # fmt: skip
    return found


def _notes(table: Table, seeds: range) -> list[str]:
    first = next(iter(table))
    one = table[first][0]
    size = first.size
    crossing = Crossing(PEERS, SITES)
    flat_trial = next(row for row in table if row.way == "flat")
    coded = table[flat_trial][0].mean_bytes
    near_trial = next(row for row in table if row.way == "gossip")
    coded_near = table[near_trial][0].mean_bytes / one.parameters
    setting = (
        f"Seeds {seeds[0]} to {seeds[-1]}. A Llama-like model of {one.parameters:,} parameters on "
        f"the bytes of the standard library's text, from random weights; {PEERS} peers in {SITES} "
        f"groups of {PEERS // SITES}; {size.steps} AdamW steps of each on {size.batch} samples of "
        f"{size.tokens} bytes, the same in every row of a seed. DDP takes as many steps, each on "
        "everybody's samples. The inner rate rises over 20 steps, and falls to zero over the last "
        f"{size.cooldown:.0%} (`inner.ends`, `inner.cooldown_s`), in every row."
    )
    rounds = (
        "Outer Nesterov: from `python -m tests.bench learning --part tuning`, for flat DiLoCo at "
        f"each H; for groups, whose rounds have {NEAR} steps whatever H is, at H = {_MIDDLE}. "
        "Every group begins a mix of each slot of the state as often as the table says, each at "
        "its own time, with another one at random (`tests/bench/mixing.py`), as the product does; "
        "what a group holds after a round arrives with the borrower's next average and the "
        "lender's after it."
    )
    losses = (
        f"Loss: nats per byte on {size.last_samples} held-out samples, of each group's own "
        "outer parameters, the mean over groups. 'Of their mean': the loss of the mean of the "
        "groups' parameters. Apart: rms distance from that mean / its norm."
    )
    traffic = (
        "Bytes between sites, all sites together: an all-reduce of one vector moves at least "
        f"{crossing.ring} vectors (sums inside sites first, then a ring among sites), and that is "
        f"what flat DiLoCo is charged, at {coded / one.parameters:.2f} bytes per value, coded "
        "without loss (DDP: 4, raw). With aggregators at every peer it would be "
        f"{crossing.aggregators:g} vectors. A mix: the loan (6 bits a value, 12 the first time) "
        "one way and the difference in q4 the other, as the product's `UnitMixer` codes them, of "
        "every mix that any group began; parameters only, as there is no outer momentum. Control "
        "messages are not counted, nor what stays inside a site: there every peer sends and "
        f"receives a coded update, {coded_near:.2f} bytes per value, every {NEAR} steps, which "
        "is what near peers have bandwidth for and far ones have not."
    )
    return [setting, rounds, losses, traffic]


def draw(table: Table) -> str:
    """Loss against steps at the middle H, the mean over seeds."""
    series = []
    highest, lowest, steps = 0.0, 9.0, 0
    for row, outcomes in table.items():
        usual = (row.shards, row.inner_lr) == ("iid", INNER_LR)
        if not usual or (row.way != "ddp" and _rival(row, table, "flat").h != _MIDDLE):
            continue
        if row.way == "flat" and row.h != _MIDDLE:
            continue
        curves = zip(*(one.curve for one in outcomes), strict=True)
        points = [(float(looks[0][0]), fmean(loss for _, loss in looks)) for looks in curves]
        highest = max(highest, points[0][1])
        lowest = min(lowest, points[-1][1])
        steps = row.size.steps
        series.append(
            svg.Series(
                WAYS[row.way].title + f", rounds of {row.h}" * bool(row.h), points,
                _COLOURS[row.way], line=True, dots=False,
                dashed=row.way == "gossip" and row.h == _MIDDLE,
            )
        )  # fmt: skip
    top, bottom = round(highest + 0.05, 1), round(lowest - 0.05, 1)
    ticks = [bottom + 0.2 * n for n in range(int((top - bottom) / 0.2) + 1)]
    return svg.chart(
        f"Loss of 16 peers in 4 groups, H = {_MIDDLE}",
        "The mean over three seeds, after equal tokens",
        svg.Axis("inner steps of each peer", 0, steps, range(0, steps + 1, 100)),
        svg.Axis("validation loss, nats per byte", bottom, top, [round(t, 1) for t in ticks]),
        series,
    )
