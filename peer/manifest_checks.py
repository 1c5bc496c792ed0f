"""How a manifest's fields are checked: every error names the field and says what it must be."""

from __future__ import annotations

from peer.errors import ManifestError


def need(holds: bool, where: str, rule: str, got: object) -> None:
    """Raise ManifestError unless it holds: the field, what it must be, what it is."""
    if not holds:
        raise ManifestError(f"{where}: {rule} (got {short(got)}); correct it and try again")


def short(value: object) -> str:
    """A value as an error shows it."""
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def between(where: str, value: float, low: float, high: float) -> None:
    """Raise ManifestError unless low <= value <= high."""
    need(low <= value <= high, where, f"must be {low:g} to {high:g}", value)


def above_zero(where: str, value: float, high: float) -> None:
    """Raise ManifestError unless 0 < value <= high."""
    need(value > 0, where, "must be > 0", value)
    need(value <= high, where, f"must be at most {high:g}", value)
