"""The live view's picture: a pure function of the state and the last notices.

All text goes through `words.clean` and into `rich.text.Text`, never through rich's markup, so no
stranger's name or reason can draw here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

from rich.columns import Columns
from rich.console import Group
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from peer.observe import words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from peer.observe.state import State
    from peer.observe.words import Line

SPARK_CHARS: Final = 24
BAR_CHARS: Final = 24
MEMBERS_SHOWN: Final = 16  # the largest group
_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_STYLES: Final = {"warning": "yellow", "error": "bold red"}
_PHASES: Final = {
    "looking": "looking for other peers",
    "syncing": "getting the run's state",
    "training": "training",
    "exchanging": "averaging with the group",
}


def render(state: State, notices: Sequence[tuple[str, Line]]) -> RenderableType:
    """The whole view; `notices` are (time of day, line)."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("loss", _loss(state))
    grid.add_row("round", _round(state))
    grid.add_row("last", _last(state))
    grid.add_row("network", _network(state))
    grid.add_row("group", _group(state))
    parts: list[RenderableType] = [_title(state), Padding(grid, (0, 1))]
    if notices:
        said = Table.grid(padding=(0, 2))
        said.add_column(style="dim", no_wrap=True)
        said.add_column(overflow="fold")
        for at, line in notices:
            said.add_row(at, Text(line.text, _STYLES.get(line.level, "")))
        parts += [Rule(style="dim"), Padding(said, (0, 1))]
    return Group(*parts)


def sparkline(values: Sequence[float], chars: int = SPARK_CHARS) -> str:
    """`values` as at most `chars` blocks, each the mean of its share; empty for fewer than two."""
    if len(values) < 2:
        return ""
    bins = min(chars, len(values))
    edges = [i * len(values) // bins for i in range(bins + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / (len(_BLOCKS) - 1) or 1.0
    return "".join(_BLOCKS[round((mean - low) / step)] for mean in means)


def _title(state: State) -> RenderableType:
    started = state.started
    if started is None:
        return Rule("Murmuration", align="left", style="dim")
    title = Text.assemble(
        ("Murmuration", "bold"),
        f" · {words.clean(started.run_name)}",
        (
            f" · {words.count(started.parameters)} parameters on {words.clean(started.device)}",
            "dim",
        ),
    )
    return Rule(title, align="left", style="dim")


def _loss(state: State) -> Text:
    text = Text()
    progress = state.progress
    if progress is None or not state.losses:
        return text.append("no step yet", "dim")
    text.append(f"{progress.loss:.3f}", "bold green")
    if spark := sparkline(state.losses):
        text.append("  " + spark, "green")
    if state.validation_loss is not None:
        text.append("  validation ", "dim").append(f"{state.validation_loss:.3f}", "bold")
    text.append(f"  {progress.tokens_per_s:,.0f}", "bold").append(" tokens/s", "dim")
    return text


def _round(state: State) -> RenderableType:
    progress = state.progress
    if state.left is not None:
        return Text(f"left: {words.clean(state.left)}")
    if progress is None:
        return Text("starting", "dim")
    text = Text.assemble(
        (str(progress.round), "bold"),
        (f"  epoch {progress.epoch}  ", "dim"),
        _PHASES.get(progress.phase, words.clean(progress.phase)),
    )
    due_s, round_s = state.due_s(), state.planned.round_s if state.planned else 0.0
    if progress.phase != "training" or due_s <= 0 or round_s <= 0:
        return text
    done = min(1.0, max(0.0, 1 - due_s / round_s))
    bar = ProgressBar(total=1.0, completed=done, width=BAR_CHARS)
    return Columns([text, bar, Text(f"{due_s:.0f} s left")], padding=(0, 2))


def _last(state: State) -> Text:
    last = state.finished
    if last is None:
        return Text("no round finished yet", "dim")
    text = Text(f"round {last.round} {words.averaged(last)} in {last.seconds:.1f} s")
    agreed = state.agreed
    # Digests of the state *after* round r are compared at the start of round r + 1.
    if agreed is not None and agreed.digest == last.digest and len(agreed.peers) > 1:
        text.append(f"  {len(agreed.peers)} peers agree on {words.clean(agreed.digest)[:8]}", "dim")
    return text


def _network(state: State) -> Text:
    progress = state.progress
    if progress is None:
        answering = sum(how == "answers" for how in state.via.values())
        tried = (
            f"{answering} of {len(state.via)} addresses answer" if state.via else "no traffic yet"
        )
        return Text(tried, "dim")
    up, down = state.rates()
    return Text.assemble(
        ("up ", "dim"),
        words.size(progress.bytes_up),
        (f" ({words.size(up)}/s)", "dim"),
        ("  down ", "dim"),
        words.size(progress.bytes_down),
        (f" ({words.size(down)}/s)", "dim"),
        ("  training waited ", "dim"),
        f"{progress.waited_share:.1%}",
    )


def _group(state: State) -> Text:
    if not state.group:
        return Text("none yet", "dim")
    text = Text.assemble(
        (words.group(state.group), "bold"), f", {words.plural(len(state.members), 'member')}"
    )
    me = state.started.peer if state.started else ""
    aggregators = frozenset(state.aggregators)
    for peer in state.members[:MEMBERS_SHOWN]:
        text.append("  ")
        text.append("★" if peer == state.coordinator else "", "yellow")
        text.append("▲" if peer in aggregators else "", "cyan")
        text.append(words.short(peer), "bold" if peer == me else "")
        text.append(" (this peer)" if peer == me else "", "dim")
    text.append("   ★ coordinator  ▲ aggregator", "dim")
    return text
