"""`python -m tests.netlab` says what it does, and what a machine lacks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.netlab import Lab, LabError, missing, namespaces, requirements, two_regions
from tests.netlab import __main__ as cli
from tests.pages import ROOT


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert missing() == "the network laboratory needs root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) != "/dev/net/tun")
    assert missing() == "the network laboratory needs the device /dev/net/tun"
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "cc" else program)
    assert missing() == "the network laboratory needs the program cc (a C compiler)"


def test_a_machine_that_cannot_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main(["verify"]) == 3
    assert "needs root" in capsys.readouterr().err
    with pytest.raises(LabError, match="needs root"), Lab(two_regions(1, 0)):
        raise AssertionError


@pytest.mark.usefixtures("machine")
def test_the_mover_compiles_without_a_warning_and_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(requirements, "_FLAGS", (*requirements._FLAGS, "-Werror"))
    program = requirements.mover()
    made = program.stat()
    assert requirements.mover().stat() == made
    assert list(program.parent.iterdir()) == [program]


@pytest.mark.usefixtures("machine")
def test_a_part_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "routers"]) == 0
    shown = capsys.readouterr().out
    assert "hole punching wall - cone" in shown
    assert "DOES NOT HOLD" not in shown


@pytest.mark.usefixtures("machine")
def test_a_laboratory_is_kept_until_it_is_interrupted() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.netlab", "up", "regions", "--size", "1"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        shown = [process.stdout.readline() for _ in range(5)]
        assert shown[0].split() == ["a1", "11.1.0.1", "11.1.0.1", "a,", "open"]
        namespace = shown[1].split()[3]
        assert namespace in namespaces.known()
        assert shown[4] == "Ctrl-C removes it.\n"
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 0
    assert "sent 0 B, received 0 B, dropped 0 B" in rest
    assert namespace not in namespaces.known()
