"""A bootstrap node in this process: what it says, holds and refuses."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from bootstrap.__main__ import main
from bootstrap.node import REFUSAL, Node, NodeConfig, open_node
from peer.__main__ import main as peer_main
from peer.exchange import RefusedError
from peer.net.libp2p import Libp2pTransport
from peer.observe import events as ev
from peer.observe.hub import Hub
from peer.receiving import Order, Receiver
from peer.state_chunks import StateGrid
from protocols.errors import RemoteProtocolError
from protocols.types import RunId

HOST = "127.0.0.1"
PATIENCE_S = 30.0


@asynccontextmanager
async def node(home: Path, **options: object) -> AsyncIterator[tuple[Node, Hub]]:
    config = {"port": 0, "metrics_port": None, **options}
    hub = Hub()
    async with open_node(NodeConfig(home=home, host=HOST, **config), hub) as opened:  # type: ignore[arg-type]
        yield opened, hub


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - a routing table tells nobody that it changed
            await asyncio.sleep(0.02)


async def test_it_says_what_it_is_and_refuses_to_be_a_member(tmp_path: Path) -> None:
    async with node(tmp_path / "node") as (boot, hub):
        guest = await Libp2pTransport.start(bytes(32), tmp_path / "guest", HOST)
        try:
            peer = await guest.connect(boot.transport.addresses()[0], 5)
            with pytest.raises(RemoteProtocolError, match=REFUSAL):
                await guest.call(peer, b"hello", 5)
            with pytest.raises(RefusedError, match=REFUSAL):
                await Receiver(guest, StateGrid({}), Order(RunId("ab" * 32), [peer])).run()
            for _ in range(50):
                with pytest.raises(RemoteProtocolError):
                    await guest.call(peer, b"hello", 5)
        finally:
            await guest.close()
    assert hub.counts["PeerRefused"] == 20, "a stranger's insistence is not told for ever"


async def test_operators_see_its_health(tmp_path: Path) -> None:
    async with node(tmp_path, metrics_port=0) as (boot, hub):
        notices = [r["text"] for r in hub.recent() if r["event"] == "Notice"]
        found = next(m for text in notices if (m := re.search(r"(http://\S+)/metrics", text)))
        async with aiohttp.ClientSession() as web, web.get(found[1] + "/healthz") as reply:
            assert reply.status == 200
            health = await reply.json()
        async with aiohttp.ClientSession() as web, web.get(found[1] + "/metrics") as reply:
            metrics = await reply.text()
    assert health["role"] == "bootstrap"
    assert health["peer"] == boot.transport.peer_id
    assert (health["peers_connected"], health["dht_nodes"], health["runs"]) == (0, 0, [])
    for name in ("peers_connected", "dht_nodes", "runs", "uptime_seconds", "daemon_up",
                 "bytes_up_total", "bytes_down_total"):  # fmt: skip
        assert re.search(rf"^murmuration_bootstrap_{name} \d", metrics, re.MULTILINE), name
    assert "murmuration_bootstrap_daemon_up 1.0" in metrics


async def test_its_address_stays_over_a_restart(tmp_path: Path) -> None:
    async with node(tmp_path) as (boot, hub):
        before = boot.transport.addresses()
        started = hub.state.started
        assert started is not None
        assert started.join_command == f"python -m peer join --via {before[0]}"
    async with node(tmp_path) as (boot, _):
        assert boot.transport.addresses() == before


async def test_nodes_find_each_other_and_remember(tmp_path: Path) -> None:
    async with node(tmp_path / "a") as (a, _):
        address = a.transport.addresses()[0]
        async with node(tmp_path / "b", via=(address,)) as (b, _):
            await until(lambda: a.directory.size() == b.directory.size() == 1)
        async with node(tmp_path / "b") as (b, hub):
            await until(lambda: b.directory.size() == 1)
            assert hub.counts["ViaAnswered"] == 1


async def test_peer_status_and_leave_know_a_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with node(tmp_path) as (boot, hub):
        asking = ["--home", str(tmp_path), "--seat", "bootstrap"]
        assert await asyncio.to_thread(peer_main, ["status", *asking]) == 0
        said = capsys.readouterr().out
        assert "trains nothing" in said
        assert boot.transport.addresses()[0] in said
        await asyncio.to_thread(peer_main, ["status", *asking, "--format", "json"])
        assert json.loads(capsys.readouterr().out)["peers"][0]["role"] == "bootstrap"
        leaving = asyncio.create_task(asyncio.to_thread(peer_main, ["leave", *asking]))
        await boot.wait_left()
    assert await leaving == 0
    assert isinstance(hub.state.left, str)
    assert hub.recent()[-1]["event"] == ev.Left.__name__


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        ([], 0, ""),
        (["run", "--via", "nowhere"], 2, "is no peer's address"),
        (["run", "--announce", "nowhere"], 2, "--announce"),
        (["run", "--port", "TAKEN"], 5, "choose another with --port"),
        (["run", "--port", "0", "--metrics-port", "TAKEN"], 5, "with --metrics-port"),
        (["run", "--metrics-port", "-2"], 2, "--metrics-port"),
        (["serve"], 2, "No such command"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(
    argv: list[str], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        argv = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in argv]
        more = ["--home", str(tmp_path), "--host", HOST] if "run" in argv else []
        assert main([*argv, *more]) == code
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == (code != 0)
