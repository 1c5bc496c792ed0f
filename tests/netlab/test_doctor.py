"""The doctor among routers, firewalls, thin and lossy lines: it names what is there.

Every host's part is a thread in its namespace with an event loop of its own, so that the libraries
are loaded once. Two open hosts are the witnesses.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dht.node import HivemindDirectory
from peer.doctor.checkup import check_up
from peer.doctor.conclude import conclude
from peer.doctor.examine import Question, examine, run_facts
from peer.doctor.explain import exit_code, explain
from peer.doctor.facts import Answered, Conclusions, Facts, Nat, Reach
from peer.doctor.serve import ProbeServer, desk_of
from peer.net.libp2p import Libp2pTransport
from peer.net.transport import Stream
from peer.observe import events as ev
from protocols.errors import RemoteProtocolError
from protocols.identity import Signer
from protocols.types import PeerId
from tests.netlab import Forward, Host, Lab, Line, Route, Spec
from tests.netlab import Nat as Router
from tests.netlab.lab import LabHost

pytestmark = pytest.mark.usefixtures("machine")

PORT = 31337
RATE_MBPS, LOSS = 10.0, 0.03
START_S = 30.0  # of a daemon, on a busy machine; it takes half a second
SPEC = Spec(
    hosts=(
        Host("open1", "z"),
        Host("open2", "z"),
        Host("open3", "z"),
        Host("cone", "z", nat=Router.PORT_RESTRICTED),
        Host("home", "z", nat=Router.PORT_RESTRICTED, forwards=(Forward(PORT, PORT),)),
        Host("sym", "z", nat=Router.SYMMETRIC),
        Host("wall", "z", nat=Router.FIREWALL),
        Host("web", "z", nat=Router.FIREWALL, outbound_ports=frozenset({443})),
        Host("far", "z"),
        Host("thin", "z", line=Line(up_mbps=RATE_MBPS, down_mbps=RATE_MBPS)),
        Host("lossy", "z"),
    ),
    routes=(
        Route(a="z", b="z", rtt_ms=20),
        Route(a="lossy", b="open2", rtt_ms=20, loss=LOSS),
    ),
)


class Witness:
    """A peer that answers probes on a host, until `stop`."""

    def __init__(self, host: LabHost, folder: Path) -> None:
        self.address: Future[str] = Future()
        self._stop: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._thread = threading.Thread(target=self._run, args=(host, folder))
        self._thread.start()

    def stop(self) -> None:
        if self._stop is not None:
            loop, event = self._stop
            loop.call_soon_threadsafe(event.set)
        self._thread.join()

    def _run(self, host: LabHost, folder: Path) -> None:
        try:
            with host.inside():
                asyncio.run(self._serve(folder))
        except BaseException as error:
            self.address.set_exception(error)

    async def _serve(self, folder: Path) -> None:
        asked = asyncio.Event()
        seed = os.urandom(32)
        transport = await Libp2pTransport.start(seed, folder, port=PORT)
        try:
            directory = await HivemindDirectory.start(transport, Signer(seed))
            probes = ProbeServer(desk_of(transport, directory.size))
            transport.serve(probes.before(_refuse), _close)
            self._stop = asyncio.get_running_loop(), asked
            outside = (a for a in transport.addresses() if a.startswith("/ip4/11."))
            self.address.set_result(next(outside))
            await asked.wait()
            await directory.close()
        finally:
            await transport.close()


async def _refuse(sender: PeerId, request: bytes) -> bytes:
    raise RemoteProtocolError(sender, "probes only")


async def _close(stream: Stream) -> None:
    await stream.close()


class Ward:
    """The laboratory, its witnesses, and what the doctor found on a host."""

    def __init__(self, lab: Lab, vias: tuple[str, ...], folder: Path) -> None:
        self.lab = lab
        self.vias = vias
        self._folder = folder

    def examine(self, name: str, **how: Any) -> Facts:
        how = {"via": self.vias, "quick": True, "device": "cpu", **how}
        question = Question(home=self._folder / name, **how)
        with self.lab.host(name).inside():
            return asyncio.run(examine(question, lambda text: None))


@pytest.fixture(scope="module")
def ward(machine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    folder = tmp_path_factory.mktemp("ward")
    run_facts(None)  # imports what may not be imported by several threads at once
    with Lab(SPEC, seed=1) as lab, ExitStack() as stack:
        witnesses = [Witness(lab.host(name), folder / name) for name in ("open1", "open2")]
        for witness in witnesses:
            stack.callback(witness.stop)
        yield Ward(lab, tuple(w.address.result(START_S) for w in witnesses), folder)


@pytest.fixture(scope="module")
def patients(ward: Ward) -> dict[str, Facts]:
    """All who need no measuring, at once."""
    ward.lab.cut("far", "open2")
    ports = {"home": PORT}
    names = ("open3", "cone", "home", "sym", "wall", "web", "far")
    with ThreadPoolExecutor(len(names)) as doctors:
        visits = {
            name: doctors.submit(ward.examine, name, port=ports.get(name, 0)) for name in names
        }
        return {name: visit.result() for name, visit in visits.items()}


@pytest.mark.parametrize(
    ("name", "nat", "reach", "words"),
    [
        ("open3", Nat.NONE, Reach.DIRECT, "Peers outside can open connections"),
        ("cone", Nat.CONE, Reach.REFUSED, "a cone"),
        ("home", Nat.CONE, Reach.DIRECT, "Peers outside can open connections"),
        ("sym", Nat.SYMMETRIC, Reach.REFUSED, "A symmetric NAT"),
        ("wall", Nat.NONE, Reach.REFUSED, "a firewall refuses connections from outside"),
    ],
)
def test_every_kind_of_place_is_named(
    patients: dict[str, Facts], name: str, nat: Nat, reach: Reach, words: str
) -> None:
    facts = patients[name]
    found = conclude(facts)
    assert (found.nat, found.reach) == (nat, reach)
    said = explain(facts, found)
    assert any(words in finding.text for finding in said), said
    assert exit_code(said) == 0


def test_who_may_only_go_out_to_443_is_told_so(patients: dict[str, Facts]) -> None:
    facts = patients["web"]
    assert [(v.answered, v.web_port) for v in facts.vias] == [(Answered.SILENT, True)] * 2
    said = explain(facts, conclude(facts))
    assert exit_code(said) == 5
    (first, *_) = (finding for finding in said if finding.topic == "via")
    assert "only to web ports" in first.text
    assert "--port 443" in first.next


def test_a_partition_shows_as_silence_of_one_while_others_answer(
    patients: dict[str, Facts],
) -> None:
    facts = patients["far"]
    assert [via.answered for via in facts.vias] == [Answered.YES, Answered.SILENT]
    said = explain(facts, conclude(facts))
    (found,) = (finding for finding in said if finding.topic == "via")
    assert "while others answer" in found.text
    assert exit_code(said) == 0


def test_at_join_a_symmetric_nat_is_told_in_a_line(ward: Ward, tmp_path: Path) -> None:
    said: list[ev.Event] = []

    async def join() -> None:
        transport = await Libp2pTransport.start(os.urandom(32), tmp_path)
        try:
            for via in ward.vias:
                await transport.connect(via, START_S)
            await check_up(transport, await transport.connected(), said.append)
        finally:
            await transport.close()

    def visit() -> None:
        with ward.lab.host("sym").inside():
            asyncio.run(join())

    with ThreadPoolExecutor(1) as doctors:
        doctors.submit(visit).result()
    (nat,) = said
    assert isinstance(nat, ev.Notice)
    assert "A symmetric NAT" in nat.text


@pytest.fixture(scope="module")
def lines(ward: Ward) -> dict[str, Conclusions]:
    """The thin line and the lossy one, each with a witness of its own."""
    with ThreadPoolExecutor(2) as doctors:
        visits = {
            name: doctors.submit(ward.examine, name, quick=False, via=(via,))
            for name, via in zip(("thin", "lossy"), ward.vias, strict=True)
        }
        return {name: conclude(visit.result()) for name, visit in visits.items()}


def test_a_thin_line_is_measured_within_15_percent(lines: dict[str, Conclusions]) -> None:
    found = lines["thin"]
    for bps in (found.up_bps, found.down_bps):
        assert bps is not None
        assert 0.85 * RATE_MBPS < bps / 1e6 < 1.0 * RATE_MBPS
    assert not found.at_least
    assert (found.loss_up, found.loss_down) == (0.0, 0.0)
    assert found.mtu == 1500


def test_a_lossy_line_is_seen_to_lose_about_that(lines: dict[str, Conclusions]) -> None:
    found = lines["lossy"]
    for ratio in (found.loss_up, found.loss_down):  # some 800 segments: 3 % +- 0.6
        assert ratio is not None
        assert LOSS - 0.02 < ratio < LOSS + 0.025
