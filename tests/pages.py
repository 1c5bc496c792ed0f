"""The pages that people read, taken apart for the tests that hold them to the truth."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bootstrap" / "README.md"])

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_PROGRAM = re.compile(r"(?:\S*/)?python3? -m (peer|bootstrap|tests\.bench)\b(.*)", re.DOTALL)
_MAKE = re.compile(r"make(?: (\w+))(.*)", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code of one language."""
    return [code for kind, code in _FENCED.findall(page.read_text("utf-8")) if kind == language]


def prose(page: Path) -> str:
    """The page without fenced code."""
    return _FENCED.sub("", page.read_text("utf-8"))


def code_lines(page: Path) -> Iterator[str]:
    """Indented code line by line, and every piece of inline code."""
    text = prose(page)
    for line in text.splitlines():
        if line.startswith("    "):
            yield line.strip()
    flowing = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    for piece in _INLINE.findall(flowing):
        yield " ".join(piece.split())


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(program, arguments) of every `python -m ...` that the page shows."""
    found = []
    for line in code_lines(page):
        match = _PROGRAM.search(line)
        if match:
            arguments = shlex.split(match[2], comments=True)
            if arguments[-1:] == ["--via"]:  # prose that means the option, not a value for it
                arguments.append("ADDRESS")
            found.append((match[1], arguments))
    return found


def make_targets(page: Path) -> list[tuple[str, list[str]]]:
    """(target, what ARGS holds) of every `make ...` that the page shows."""
    found = []
    for line in code_lines(page):
        match = _MAKE.fullmatch(line)
        if match:
            rest = dict(part.partition("=")[::2] for part in shlex.split(match[2], comments=True))
            found.append((match[1], shlex.split(rest.get("ARGS", ""))))
    return found


def links(page: Path) -> list[str]:
    """The targets of the page's links, but for those to other places."""
    return [x for x in _LINK.findall(prose(page)) if "://" not in x]


def anchors(page: Path) -> set[str]:
    """What can stand after # in a link to the page (GitHub's rule, for plain headings)."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
