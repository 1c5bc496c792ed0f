"""Asking the peer that runs here, from another process."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from typing import TYPE_CHECKING, Any

import pytest

from peer import control
from peer.control import ControlServer, ask
from peer.errors import DataError, NetworkError, NotRunningError, PeerError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


async def echo(args: dict[str, Any]) -> dict[str, Any]:
    return {"got": args}


async def refuse(args: dict[str, Any]) -> dict[str, Any]:
    raise DataError("no text there; give a folder with text")


HANDLERS = {"echo": echo, "refuse": refuse}


async def test_a_question_gets_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with ControlServer(path, HANDLERS):
        assert path.stat().st_mode & 0o777 == 0o600
        answer = await asyncio.to_thread(ask, path, "echo", {"word": "hällo\n" * 1000})
        assert answer == {"got": {"word": "hällo\n" * 1000}}
        answers = await asyncio.gather(
            *(asyncio.to_thread(ask, path, "echo", {"n": n}) for n in range(10))
        )
        assert [a["got"]["n"] for a in answers] == list(range(10))
    assert not path.exists()


async def test_a_refusal_keeps_its_text_and_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with ControlServer(path, HANDLERS):
        with pytest.raises(DataError, match="give a folder"):
            await asyncio.to_thread(ask, path, "refuse")
        with pytest.raises(UsageError, match="echo, refuse"):
            await asyncio.to_thread(ask, path, "dance")


def test_where_no_peer_runs_the_next_step_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="peer join"):
        ask(tmp_path / "control.sock", "status")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "control.sock"))
    dead.close()
    with pytest.raises(NotRunningError):
        ask(tmp_path / "control.sock", "status")


def test_a_frozen_peer_costs_no_more_than_the_timeout(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(str(path))
        frozen.listen(1)
        with pytest.raises(NetworkError, match="end its process"):
            ask(path, "status", timeout_s=0.05)


async def test_a_dead_peers_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    async with ControlServer(path, HANDLERS):
        assert await asyncio.to_thread(ask, path, "echo") == {"got": {}}


async def test_a_home_with_a_long_path_works_and_leaves_nothing_behind(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    path = folder / "control.sock"
    async with ControlServer(path, HANDLERS):
        # Who asks may live in another environment than who answers.
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        assert await asyncio.to_thread(ask, path, "echo") == {"got": {}}
        (room,) = runtime.iterdir()
        assert room.stat().st_mode & 0o777 == 0o700
    assert list(runtime.iterdir()) == list(folder.iterdir()) == []
    with pytest.raises(NotRunningError):
        ask(path, "echo")
    # A killed peer leaves its folder; the next one clears it away.
    killed = ControlServer(path, HANDLERS)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    killed._bind().close()
    async with ControlServer(path, HANDLERS):
        assert len(list(runtime.iterdir())) == 1


async def test_a_link_in_the_seat_to_something_else_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "control.sock").symlink_to(tmp_path / "precious" / "control.sock")
    async with ControlServer(tmp_path / "control.sock", HANDLERS):
        assert (tmp_path / "precious").is_dir()


@pytest.mark.parametrize(
    "junk", [b"", b"{}", b"[]", b'{"verb": []}', b'{"verb": "echo", "args": 3}', b"\xff", b"["]
)
async def test_junk_is_answered_with_an_error(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "control.sock"
    async with ControlServer(path, HANDLERS):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(junk + b"\n")
        assert json.loads(await reader.readline())["exit_code"] == 2
        writer.close()
        await writer.wait_closed()


async def test_an_endless_line_and_a_silent_caller_are_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "REQUEST_TIMEOUT_S", 0.05)
    path = tmp_path / "control.sock"
    async with ControlServer(path, HANDLERS):
        for data in (b"x" * 200_000, b"", b'{"verb"'):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(data)
            try:
                assert await reader.read() == b""
            except ConnectionResetError:
                assert len(data) == 200_000  # hung up on with bytes still unread
            writer.close()


async def test_closing_gives_up_on_handlers_that_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "FAREWELL_TIMEOUT_S", 0.05)
    asked = asyncio.Event()

    async def hang(args: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        await asyncio.Event().wait()
        return {}

    path = tmp_path / "control.sock"
    async with ControlServer(path, {"hang": hang}):
        question = asyncio.create_task(asyncio.to_thread(ask, path, "hang"))
        await asked.wait()
    with pytest.raises(NetworkError, match="without an answer"):
        await question


async def test_an_answer_that_ends_the_peer_still_arrives(tmp_path: Path) -> None:
    leaving = asyncio.Event()

    async def leave(args: dict[str, Any]) -> dict[str, Any]:
        leaving.set()
        return {"left": True}

    path = tmp_path / "control.sock"
    async with ControlServer(path, {"leave": leave}):
        question = asyncio.create_task(asyncio.to_thread(ask, path, "leave"))
        await leaving.wait()
    assert await question == {"left": True}


async def test_an_answer_beyond_the_bound_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(args: dict[str, Any]) -> dict[str, Any]:
        return {"text": "x" * control.REPLY_BYTES_MAX}

    path = tmp_path / "control.sock"
    async with ControlServer(path, {"talk": talk}):
        with pytest.raises(PeerError, match="too long"):
            await asyncio.to_thread(ask, path, "talk")
    shutil.rmtree(tmp_path)


async def test_a_handlers_bug_is_heard_and_ends_only_that_answer(tmp_path: Path) -> None:
    async def blunder(args: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("a bug")

    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context))
    path = tmp_path / "control.sock"
    async with ControlServer(path, {"blunder": blunder, **HANDLERS}):
        with pytest.raises(NetworkError, match="log"):
            await asyncio.to_thread(ask, path, "blunder")
        assert await asyncio.to_thread(ask, path, "echo") == {"got": {}}
    assert "a bug" in str(heard[0]["exception"])
