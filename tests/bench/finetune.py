"""Finetuning a small model on eight people's tasks: exact, of mixed ranks and kinds, anarchic.

All parts, one after another; each of them is a measurement of its own as well (`--part ranks`).
It needs data (`--data DIR`, see `finetune_base`), and goes on where a killed run was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.bench import (
    finetune_anarchic,
    finetune_exact,
    finetune_kinds,
    finetune_ranks,
    finetune_zeroth,
)
from tests.bench.finetune_arms import SEEDS, TUNING, base_of, kept_of
from tests.bench.result import Cell, Progress, Result

_PARTS: Final = (
    finetune_exact, finetune_ranks, finetune_kinds, finetune_zeroth, finetune_anarchic,
)  # fmt: skip


def run(quick: bool, seed: int, progress: Progress, data: Path | None = None) -> Result:
    """See `registry.Measurement`. Twenty minutes on two idle cores; quick: a minute."""
    facts = base_of(data, quick, progress).facts
    results = []
    for part in _PARTS:
        progress(f"{part.PART} ...")
        results.append(part.measure(quick, seed, progress, data))
    for part in _PARTS:
        kept_of(part.PART, quick).forget()
    rows = [
        {"part": part.PART, **row}
        for part, result in zip(_PARTS, results, strict=True)
        for row in result.rows
    ]
    setting = (
        f"Seeds {seed} to {seed + SEEDS - 1}; they draw adapters, the order of samples, and"
        " directions. The base is the same for all: a Llama-like model of"
        f" {facts['parameters']:,} parameters, {facts['tokens_read']:,} tokens of plays, school"
        f" maths and other tasks read, at {facts['loss']:.3f} nats per token of held-out text."
        " Tasks (Natural Instructions, one per peer, never read by the base):"
        f" {', '.join(map(str, facts['clients']))}."
    )
    losses = (
        "Loss: nats per token of held-out answers, all tokens alike, as training weighs them. Rates"
        " are the best of three for each way by itself, after half of the rounds, on seed"
        f" {seed + TUNING}, which is not in the table; all else is the same for all ways. Rates are"
        " constant after 20 steps of warm-up. KiB up: the most that one peer sends in a round,"
        " coded (without loss but for q4; HetLoRA's as plain float32). Losses do not depend on the"
        " machine's load."
    )
    return Result(
        rows=_even(rows),
        bars=[bar for result in results for bar in result.bars],
        notes=[setting, losses, *(note for result in results for note in result.notes)],
    )


def _even(rows: list[dict[str, Cell]]) -> list[Mapping[str, Cell]]:
    """The same columns in every row."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: name == "KiB up")
    return [{name: row.get(name, "-") for name in columns} for row in rows]
