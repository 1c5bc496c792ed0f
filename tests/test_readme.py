"""What the README and the other pages show works as written."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from bootstrap.cli import app as bootstrap_app
from peer.cli.app import app as peer_app
from peer.cli.ending import EXIT_CODES
from tests import pages
from tests.bench import registry
from tests.pages import PAGES, ROOT

README = ROOT / "README.md"
SNIPPET_S_MAX = 120  # a few seconds on a quiet machine; most of it is importing torch


def parse(program: Any, arguments: list[str]) -> None:
    """Take `arguments` apart as the program would, without doing anything; fails as it would."""
    command, rest, parent = typer.main.get_command(program), arguments, None
    while True:
        context = command.make_context(command.name or "", list(rest), parent=parent)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*getattr(context, "_protected_args", []), *context.args]
        if not rest:
            return
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None, arguments
        command, parent = found, context


@pytest.mark.parametrize("code", pages.blocks(README, "python"))
def test_the_snippet_runs_as_written(code: str, tmp_path: Path) -> None:
    assert 'host="127.0.0.1"' in code, "a test must not open a port to the world"
    environment = os.environ | {
        "MURMURATION_HOME": str(tmp_path),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'codecs'}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=SNIPPET_S_MAX,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rounds; others join through /ip4/127.0.0.1/" in done.stdout


def test_there_is_a_snippet() -> None:
    assert pages.blocks(README, "python")


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        pytest.param(program, arguments, id=f"{pages.name(page)}: {program} {' '.join(arguments)}")
        for page in PAGES
        for program, arguments in pages.commands(page)
    ],
)
def test_every_command_shown_parses(program: str, arguments: list[str]) -> None:
    if program == "tests.bench":
        names = {x for x in arguments[:1] if not x.startswith("-")} - {"NAME"}
        assert names <= set(registry.MEASUREMENTS)
        return
    with contextlib.suppress(typer.Exit):  # --help
        parse(peer_app if program == "peer" else bootstrap_app, arguments)


def test_the_readme_shows_the_commands_of_a_volunteer() -> None:
    shown = {arguments[0] for program, arguments in pages.commands(README) if arguments}
    assert {"join", "status", "leave", "identity", "sample", "export", "run"} <= shown


def test_a_command_that_does_not_exist_is_noticed() -> None:
    for arguments in (["jion"], ["join", "--vai", "x"], ["run", "begin", "x.toml"], ["export"]):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(peer_app, arguments)


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_every_make_target_shown_exists(page: Path) -> None:
    known = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target, arguments in pages.make_targets(page):
        assert target in known, f"{pages.name(page)}: make {target}"
        if target == "join":
            parse(peer_app, ["join", *arguments])


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in pages.links(page):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{pages.name(page)}: {link}"
        assert target.is_relative_to(ROOT), f"{pages.name(page)}: {link} leaves the repository"
        if anchor:
            assert anchor in pages.anchors(target), f"{pages.name(page)}: {link}"


def test_the_exit_codes_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", README.read_text("utf-8"), re.MULTILINE)
    assert [(int(code), text) for code, text in rows] == list(EXIT_CODES)
