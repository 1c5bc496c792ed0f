"""A result as a table for people, as JSON for scripts, as markdown for the record."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.bench.result import Bar, Cell, Result


def to_json(result: Result) -> str:
    """`[{"bar", "value", "must", "holds", "reference"}]`, nothing else; null is "not measured"."""
    bars = [asdict(bar) for bar in result.bars]
    for bar in bars:
        if bar["value"] is not None and not math.isfinite(bar["value"]):
            bar["value"] = None  # JSON has no word for it
    return json.dumps(bars, indent=2)


def show(title: str, result: Result, console: Console) -> None:
    """The table, the bars and the notes on `console`."""
    console.print(_table(title, _columns(result.rows), [list(r.values()) for r in result.rows]))
    if result.bars:
        console.print(_table("Bars", _BAR_COLUMNS, [_bar_cells(bar) for bar in result.bars]))
    for note in result.notes:
        console.print(Text(f"- {note}"), soft_wrap=True)


def to_markdown(title: str, command: str, facts: Mapping[str, str], result: Result) -> str:
    """A page that says what was run, where, and what came out."""
    parts = [
        f"# {title}",
        f"    {command}",
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        _grid(_columns(result.rows), [list(row.values()) for row in result.rows]),
    ]
    if result.bars:
        parts += ["## Bars", _grid(_BAR_COLUMNS, [_bar_cells(bar) for bar in result.bars])]
    if result.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in result.notes)]
    return "\n\n".join(parts) + "\n"


_BAR_COLUMNS = ["bar", "value", "must", "holds", "reference"]


def _bar_cells(bar: Bar) -> list[Cell]:
    value = "not measured" if bar.value is None else bar.value
    return [bar.bar, value, bar.must, "yes" if bar.holds else "NO", bar.reference]


def _columns(rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    return list(rows[0]) if rows else []


def _cell(cell: Cell) -> str:
    if cell is None or cell != cell:  # NaN
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _numeric(rows: Sequence[Sequence[Cell]], column: int) -> bool:
    return any(isinstance(row[column], int | float) for row in rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(
            Text(column),
            justify="right" if _numeric(rows, index) else "left",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(_cell(cell)) for cell in row))
    return table


def _grid(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    rules = ["---:" if _numeric(rows, index) else "---" for index in range(len(columns))]
    cells = ([_cell(cell).replace("|", "\\|") for cell in row] for row in rows)
    lines = [columns, rules, *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
