"""How commands end: one line, the documented code, and no traceback but for a bug."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peer import errors
from peer.cli import ending, running
from peer.cli.ending import EXIT_CODES, explain, run_app
from peer.cli.running import Interrupts
from peer.errors import DataError, NetworkError, StorageError
from tests.cli.conftest import Cli

ROOT = Path(__file__).parents[2]
LIGHT = [
    "--help", "join --help", "run start --help", "status", "identity", "identity --format json",
    "leave", "run new made.toml",
]  # fmt: skip
HEAVY = {"torch", "hivemind", "transformers", "numpy", "aiohttp"}


def test_what_is_asked_often_is_answered_at_once(tmp_path: Path) -> None:
    program = f"""
import sys, time
from peer.__main__ import main
for command in {LIGHT!r}:
    main(command.split())
print("used", sorted({HEAVY!r} & set(sys.modules)), time.process_time())
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "codecs")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, cwd=tmp_path, check=True,
        env={**os.environ, "PYTHONPATH": path, "MURMURATION_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    _, loaded, seconds = done.stdout.splitlines()[-1].rsplit(maxsplit=2)
    assert loaded == "[]", done.stdout
    assert float(seconds) < 2.0, "eight commands in one process, each with its own help to draw"


def test_the_help_teaches(cli: Cli) -> None:
    said = cli("--help")
    assert said.code == 0
    assert "join --via ADDRESS" in said.out
    for code, text in EXIT_CODES:
        assert f"{code:>5}  {text}" in said.out
    assert cli().out == said.out, "no command at all: the same help"


def test_every_error_has_a_documented_code() -> None:
    codes = [code for code, _ in EXIT_CODES]
    kinds = errors.PeerError.__subclasses__()
    assert sorted(kind.exit_code for kind in kinds) == list(range(2, 10))
    assert {kind.exit_code for kind in kinds} < set(codes)
    assert len(set(codes)) == len(codes)


def test_a_trouble_is_one_line_with_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    nested = ExceptionGroup("", [ExceptionGroup("", [StorageError("no room;\n\x1b[2J buy some")])])
    assert explain(nested, "peer") == 7
    assert capsys.readouterr().err == "error: no room; [2J buy some\n"
    two = ExceptionGroup("", [NetworkError("a; b"), NetworkError("a; b"), DataError("c; d")])
    assert explain(two, "peer") == 5
    assert capsys.readouterr().err == "error: a; b\nerror: c; d\n"


def test_a_bug_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    bug = KeyError("what?")
    bug.add_note("The log of what went before: /tmp/log.jsonl")
    assert explain(ExceptionGroup("", [NetworkError("a; b"), bug]), "peer") == 1
    said = capsys.readouterr().err
    assert "KeyError: 'what?'" in said
    assert "/tmp/log.jsonl" in said
    assert said.splitlines()[-1].startswith("error: this is a bug; please report it")


def test_ctrl_c_shows_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def app(**_: object) -> int:
        raise KeyboardInterrupt

    assert run_app(app, ["x"], "peer") == ending.INTERRUPTED
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["jion"], "Did you mean 'join'"),
        (["join", "--prot", "7"], "--port"),
        (["join", "--port", "70000"], "65535"),
        (["run", "new"], "see python -m peer run new --help"),
        (["sample"], "TEXT"),
        (["export", "x", "--seat", "nobody"], "no seat 'nobody'"),
    ],
)
def test_a_wrong_command_line_says_what_is_right(cli: Cli, argv: list[str], text: str) -> None:
    said = cli(*argv)
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert text.lower() in said.err.lower()
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_full_disk_is_said_with_what_to_do(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "codecs")])
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", sys.executable, "-m", "peer", "identity",
         "--home", str(tmp_path / "home")],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert "identity.key" in done.stderr
    assert "free some space" in done.stderr
    assert not (tmp_path / "home" / "seat-1" / "identity.key").exists()


# ── Ctrl-C ───────────────────────────────────────────────────────────────────────────────


class LeftAtOnceError(Exception):
    """Stands in for the end of the process."""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise LeftAtOnceError

    monkeypatch.setattr("os._exit", leave)
    return codes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_the_second_ends(
    number: signal.Signals, at_once: list[int]
) -> None:
    before = signal.getsignal(number)

    async def work(interrupts: Interrupts) -> int:
        asked = asyncio.Event()
        interrupts.politely(asked.set)
        signal.raise_signal(number)
        await asyncio.wait_for(asked.wait(), 5)
        assert interrupts.asked
        assert at_once == []
        with pytest.raises(LeftAtOnceError):
            signal.raise_signal(number)
        return 0

    with Interrupts() as interrupts:
        assert running.run_loop(lambda: work(interrupts)) == 0
    assert at_once == [130]
    assert signal.getsignal(number) is before


def test_a_signal_before_anything_has_begun_ends_at_once(at_once: list[int]) -> None:
    with Interrupts(), pytest.raises(LeftAtOnceError):
        signal.raise_signal(signal.SIGINT)
    assert at_once == [130]


def test_a_program_under_nohup_survives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


CLOSED = """
import asyncio, os, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))  # now it controls this session, and hangs up on it
from peer.cli.running import Interrupts, run_loop
async def work(interrupts):
    asked = asyncio.Event()
    interrupts.politely(asked.set)
    print("ready", flush=True)
    await asked.wait()
    print("goodbye", flush=True)
    return 7
with Interrupts() as interrupts:
    sys.exit(run_loop(lambda: work(interrupts)))
"""


def test_a_closed_terminal_is_a_polite_request_too() -> None:
    ours, theirs = os.openpty()
    path = os.pathsep.join([str(ROOT), str(ROOT / "codecs")])
    with subprocess.Popen(
        [sys.executable, "-c", CLOSED], stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, env={**os.environ, "PYTHONPATH": path},
    ) as process:  # fmt: skip
        os.close(theirs)
        said = b""
        while b"ready" not in said:
            said += os.read(ours, 1024)
        os.close(ours)
        assert process.wait(30) == 7, "to write its goodbye to nobody is no failure"
