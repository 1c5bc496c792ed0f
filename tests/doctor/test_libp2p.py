"""The whole examination over real daemons, on this machine."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from peer.__main__ import main
from peer.clock import SYSTEM
from peer.doctor.checkup import check_up
from peer.doctor.conclude import conclude
from peer.doctor.examine import Question, examine
from peer.doctor.explain import explain
from peer.doctor.facts import Answered, Facts, Nat, Reach
from peer.doctor.messages import Dialled
from peer.home import open_seat
from peer.net.libp2p import Libp2pTransport
from peer.net.p2pd import remember_port
from peer.observe import events as ev
from protocols.identity import Signer
from tests.doctor.conftest import HOST


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


async def look(home: Path, *via: Libp2pTransport, quick: bool = False) -> Facts:
    addresses = tuple(transport.addresses()[0] for transport in via)
    question = Question(home=home, via=addresses, host=HOST, device="cpu", quick=quick)
    return await examine(question, lambda text: None)


async def test_neighbours_are_measured_and_say_nothing_of_the_world(
    tmp_path: Path, willing: Libp2pTransport, unwilling: Libp2pTransport
) -> None:
    with open_seat(tmp_path) as seat:
        folder = seat.folder
    port, lane_port = free_port(), free_port()
    remember_port(folder, port)
    remember_port(folder, lane_port, "lane-port")
    facts = await look(tmp_path, willing, unwilling)
    asked = {peer.peer: peer for peer in facts.peers}
    good, old = asked[willing.peer_id], asked[unwilling.peer_id]
    assert not old.probes
    assert good.dialled == {port: Dialled.LIBP2P, lane_port: Dialled.NONCE}
    assert good.seen == good.sent_from
    assert good.seen is not None
    assert good.seen.port == port, "libp2p dials from where it listens"
    assert abs(good.skew_s or 99) <= good.skew_error_s + 0.001
    assert good.up is not None
    assert good.up.segments > 300
    assert not good.outside
    assert good.down is not None
    assert good.down.segments > 300
    assert min(good.up_bps or 0, good.down_bps or 0) > 20e6
    assert good.mtu > 1500
    assert facts.dht_nodes >= 1
    assert facts.run is not None
    assert facts.run.codec == "q4"
    assert facts.machine is not None
    assert facts.machine.device == "cpu"
    found = conclude(facts)
    assert (found.nat, found.reach) == (Nat.UNKNOWN, Reach.UNKNOWN)
    assert {f.topic for f in explain(facts, found)} >= {"probes", "reach", "nat", "bandwidth"}


async def test_those_who_do_not_answer_are_told_apart(
    tmp_path: Path, willing: Libp2pTransport, unwilling: Libp2pTransport
) -> None:
    here, there = willing.addresses()[0], unwilling.addresses()[0]
    other = Signer(os.urandom(32)).peer_id
    stranger = f"{there.rpartition('/')[0]}/{other}"
    nobody = f"/ip4/{HOST}/tcp/{free_port()}/p2p/{other}"
    question = Question(home=tmp_path, via=(stranger, nobody, here), host=HOST, quick=True)
    facts = await examine(question, lambda text: None)
    answers = {via.address: via.answered for via in facts.vias}
    assert answers == {
        stranger: Answered.OTHER, nobody: Answered.REFUSED, here: Answered.YES,
    }  # fmt: skip
    assert [peer.peer for peer in facts.peers] == [willing.peer_id]
    assert facts.peers[0].up is None
    assert facts.peers[0].up_bps is None


async def test_the_check_at_join_is_silent_where_all_is_well(
    tmp_path: Path, willing: Libp2pTransport
) -> None:
    transport = await Libp2pTransport.start(os.urandom(32), tmp_path / "me", HOST)
    said: list[ev.Event] = []
    try:
        await transport.connect(willing.addresses()[0], 5.0)
        await check_up(transport, await transport.connected(), said.append)
    finally:
        await transport.close()
    assert said == []


class Slow:
    """A clock that is behind."""

    def time(self) -> float:
        return SYSTEM.time() - 40

    def monotonic(self) -> float:
        return SYSTEM.monotonic()


async def test_the_check_at_join_tells_of_a_wrong_clock(
    tmp_path: Path, willing: Libp2pTransport
) -> None:
    transport = await Libp2pTransport.start(os.urandom(32), tmp_path / "me", HOST)
    said: list[ev.Event] = []
    try:
        await transport.connect(willing.addresses()[0], 5.0)
        await check_up(transport, await transport.connected(), said.append, clock=Slow())
    finally:
        await transport.close()
    (notice,) = said
    assert isinstance(notice, ev.Notice)
    assert notice.level == "warning"
    assert "40.0 s behind" in notice.text
    assert "timedatectl" in notice.text


def test_with_no_peers_at_all_it_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--home", str(tmp_path), "--host", HOST, "--device", "cpu"]
    assert main(["doctor", *here, "--quick"]) == 5
    out, err = capsys.readouterr()
    assert "--via ADDRESS" in out
    assert "python -m bootstrap run" in out
    assert "disk are free" in out
    assert not (tmp_path / "seat-1").exists(), "it takes no seat"
    assert "trying" not in err


def test_a_script_gets_json_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = main(
            ["doctor", "--home", str(tmp_path), "--host", HOST, "--port", str(port),
             "--quick", "--format", "json"]
        )  # fmt: skip
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert code == told["exit_code"] == 5
    assert err == ""
    (found,) = (f for f in told["findings"] if f["topic"] == "port")
    assert found["level"] == "error"
    assert str(port) in found["text"]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--via", "nowhere"], "is no peer's address"),
        (["--announce", "nowhere"], "--announce"),
        (["--seat", "nobodys"], "no seat"),
        (["--upload", "fast"], "fast"),
    ],
)
def test_what_makes_no_sense_is_refused(
    argv: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--home", str(tmp_path), *argv]) == 2
    assert text in capsys.readouterr().err
