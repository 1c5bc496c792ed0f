"""Facts, conclusions and findings for the screen and for scripts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from peer.doctor.explain import exit_code
from peer.doctor.facts import Conclusions, Facts, plain
from peer.doctor.findings import Finding, Level

FORMAT: Final = 1
"""Of the JSON; grows when a field goes or means something else."""
_MARKS: Final = {
    Level.OK: "ok", Level.NOTE: "note", Level.WARNING: "warning", Level.ERROR: "ERROR",
}  # fmt: skip


def as_json(facts: Facts, found: Conclusions, findings: list[Finding]) -> dict[str, Any]:
    """Plain JSON values: `findings` for people's eyes, `conclusions` for scripts, all `facts`."""
    return {
        "format": FORMAT,
        "exit_code": exit_code(findings),
        "findings": [plain(finding) for finding in findings],
        "conclusions": plain(found),
        "facts": plain(facts),
    }


def lines(findings: list[Finding]) -> Iterator[str]:
    """One line for each finding, and one for what to do."""
    width = max(len(mark) for mark in _MARKS.values())
    for finding in findings:
        yield f"{_MARKS[finding.level]:<{width}}  {finding.text}"
        if finding.next:
            yield f"{'':<{width}}  -> {finding.next}"
    wrong = [f for f in findings if f.level is Level.ERROR]
    doubtful = [f for f in findings if f.level is Level.WARNING]
    yield ""
    if wrong:
        yield f"{len(wrong)} wrong, {len(doubtful)} could be better; begin with the first ERROR."
    elif doubtful:
        yield f"It works; {len(doubtful)} could be better."
    else:
        yield "All is well."
