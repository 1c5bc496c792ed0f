"""What a doctor says of one thing that it looked at."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """Could not be told, or is so by choice."""
    WARNING = "warning"
    """Works, but worse than it might."""
    ERROR = "error"
    """Does not work until somebody does something."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    """A stable name for scripts."""
    level: Level
    text: str
    next: str = ""
    """What to do; never empty unless the level is `ok`."""
    exit_code: int = 0
    """Of the whole command, where the level is `error`."""


def rate(bps: float | None) -> str:
    """A rate for people."""
    if bps is None:
        return "unknown"
    if bps >= 1e9:
        return f"{bps / 1e9:.3g} Gbit/s"
    return f"{bps / 1e6:.3g} Mbit/s" if bps >= 1e6 else f"{bps / 1e3:.3g} kbit/s"
