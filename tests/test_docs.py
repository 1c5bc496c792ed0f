"""The pages under docs/ know everything that is there, and nothing that is not."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

import pytest

from peer import errors
from peer.manifest import MODEL_TYPES, Asset, Manifest
from peer.observe.metrics import Metrics
from protocols import limits, messages
from protocols.blocks import BlockRange, BlockReport
from protocols.loans import Contact, Loan, MixNote
from protocols.records import PeerRecord
from tensorcodecs import CODEC_NAMES
from tests import pages
from tests.pages import ROOT

DOCS = ROOT / "docs"
PACKAGES = ("protocols", "codecs/tensorcodecs", "dht", "peer", "bootstrap")
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "s": 1, "": 1}
SECTIONS = [
    (name, hint)
    for name, hint in typing.get_type_hints(Manifest).items()
    if dataclasses.is_dataclass(hint)
]


def text_of(page: str) -> str:
    return (DOCS / page).read_text("utf-8")


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its rank or above."""
    match = re.search(
        rf"^(#+) {re.escape(heading)}$(.*?)(?=^#{{1,2}} |\Z)",
        text_of(page), re.MULTILINE | re.DOTALL,
    )  # fmt: skip
    assert match is not None, f"docs/{page} has no heading {heading!r}"
    return match[2]


def rows(text: str) -> dict[str, list[str]]:
    """The rows of tables by the code in their first cell."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            found[cells[0].strip("`")] = cells[1:]
    return found


def as_toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def fields_of(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


# ── the manifest ─────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(("name", "kind"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_every_field_of_a_manifest_is_explained_with_its_default(name: str, kind: Any) -> None:
    told = rows(section("manifest.md", name))
    assert list(told) == fields_of(kind)
    for field in dataclasses.fields(kind):
        default = "none" if field.default is dataclasses.MISSING else f"`{as_toml(field.default)}`"
        assert told[field.name][0] == default, f"{name}.{field.name}"


def test_the_manifests_own_fields_and_its_assets_are_explained() -> None:
    sections = {name for name, _ in SECTIONS}
    assert set(rows(section("manifest.md", "Top level"))) == set(fields_of(Manifest)) - sections
    assert list(rows(section("manifest.md", "assets"))) == fields_of(Asset)


def test_the_architectures_and_codecs_are_listed() -> None:
    listed = section("manifest.md", "model.config")
    assert set(MODEL_TYPES) <= set(re.findall(r"`([a-z0-9_]+)`", listed))
    assert set(CODEC_NAMES) <= set(re.findall(r"`([a-z0-9-]+)`", section("manifest.md", "codec")))


# ── the protocol ─────────────────────────────────────────────────────────────────────────
def test_every_message_is_listed_with_its_tag_and_fields() -> None:
    table = text_of("protocol.md")
    kinds = messages._MESSAGES | messages._HEADERS
    for tag, kind in kinds.items():
        row = re.search(rf"^\| {tag} \| `{kind.__name__}` \| (.*?) \|", table, re.MULTILINE)
        assert row is not None, f"{tag} {kind.__name__}"
        assert re.findall(r"`(\w+)`", row[1]) == fields_of(kind)
    tags = re.findall(r"^\| (\d+) \| `\w+` \|", table, re.MULTILINE)
    assert [int(tag) for tag in tags] == sorted(kinds)


def test_plans_outcomes_and_records_are_listed_with_their_fields() -> None:
    parts = rows(section("protocol.md", "Messages"))
    for kind in (
        messages.Plan, messages.Seat, messages.Span, messages.OutcomeHeader, messages.Contributor,
        BlockReport, BlockRange, MixNote, Loan, Contact,
    ):  # fmt: skip
        assert re.findall(r"`(\w+)`", parts[kind.__name__][0]) == fields_of(kind)
    record = text_of("protocol.md").partition("\n`PeerRecord`: ")[2].partition(";")[0]
    assert re.findall(r"`(\w+)`", record) == fields_of(PeerRecord)


def test_every_limit_is_listed_with_its_value() -> None:
    told = rows(section("protocol.md", "Limits"))
    known = {name: value for name, value in vars(limits).items() if name.isupper()}
    assert set(told) == set(known)
    for name, (value,) in told.items():
        number, _, unit = value.partition(" ")
        assert float(number) * UNITS[unit] == known[name], name


# ── operations and architecture ──────────────────────────────────────────────────────────
def test_every_metric_is_listed() -> None:
    known = {
        sample.name
        for metric in Metrics().registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }
    told = set(re.findall(r"`(murmuration_[a-z_]+)`", text_of("operations.md")))
    assert told == known


def test_every_error_is_listed_with_its_exit_code() -> None:
    told = {
        (int(code), name)
        for code, name in re.findall(
            r"^\| (\d+) \| `(\w+)` \|", text_of("operations.md"), re.MULTILINE
        )
    }
    assert told == {(kind.exit_code, kind.__name__) for kind in errors.PeerError.__subclasses__()}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_on_the_tour(package: str) -> None:
    tour = text_of("architecture.md")
    start = tour.index(f"\n`{package}/`: ")
    part = tour[start : tour.index("\n\n`", start) if "\n\n`" in tour[start:] else None]
    told = set(re.findall(r"`([\w/]+\.py)`", part))
    known = {
        str(path.relative_to(ROOT / package))
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert told == known


def test_every_page_of_the_docs_can_be_found_from_the_readme() -> None:
    found, look = set(), [ROOT / "README.md"]
    while look:
        page = look.pop()
        for link in pages.links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target not in found:
                found.add(target)
                look.append(target)
    assert set(DOCS.glob("*.md")) <= found
