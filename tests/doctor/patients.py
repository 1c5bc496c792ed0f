"""Facts for tests: a healthy machine, and whatever a test changes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peer.doctor.conclude import conclude
from peer.doctor.explain import explain
from peer.doctor.facts import (
    Answered,
    Facts,
    Flow,
    MachineFacts,
    PeerFacts,
    PortFacts,
    RunFacts,
    ViaFacts,
)
from peer.doctor.findings import Finding
from peer.doctor.messages import Dialled, Place

OWN = "198.18.0.7"
PUBLIC = "45.9.0.7"
HOSTS = ("45.9.1.1", "45.9.2.2", "45.9.3.3")
PORT = 31337


def address(host: str) -> str:
    return f"/ip4/{host}/tcp/{PORT}/p2p/12D3KooW{host.replace('.', 'x')}"


def witness(number: int = 0, **changes: Any) -> PeerFacts:
    """A peer out in the world that sees a machine without NAT, and could dial it."""
    facts = PeerFacts(
        peer=f"12D3KooW{number}",
        address=address(HOSTS[number]),
        skew_s=0.1,
        skew_error_s=0.01,
        seen=Place(PUBLIC, PORT),
        sent_from=Place(PUBLIC, PORT),
        outside=True,
        rtt_s=0.02,
        rtt_busy_s=0.05,
        dialled={PORT: Dialled.LIBP2P},
        dht_nodes=3,
        up=Flow(segments=500, repeated=0),
        down=Flow(segments=500, repeated=0),
        mtu=1500,
        up_bps=40e6,
        down_bps=90e6,
    )
    return replace(facts, **changes)


def port(number: int = PORT, **changes: Any) -> PortFacts:
    return replace(PortFacts(port=number, given=False, free=True, ours=False), **changes)


MACHINE = MachineFacts(
    home="/home/v/.local/share/murmuration", disk_free=50 * 10**9, writable=True,
    memory_total=16 * 10**9, memory_free=12 * 10**9, threads=4, device="cpu", device_memory=0,
)  # fmt: skip
RUN = RunFacts(
    run="ab" * 32, name="first light", parameters=3_200_000, method="pretrain", codec="q4",
    fragments=1, exchange_s=20.0, budget_s=6.0, members_max=8, aggregators_max=4,
    snr_db=(16.5, 5.5),
)  # fmt: skip
HEALTHY = Facts(
    hosts=(PUBLIC,),
    libp2p=port(),
    lane=port(0),
    running=False,
    vias=tuple(ViaFacts(address=address(h), answered=Answered.YES) for h in HOSTS[:2]),
    peers=(witness(0), witness(1)),
    dht_nodes=2,
    machine=MACHINE,
    run=RUN,
)


def behind(*seen: Place, dialled: Dialled = Dialled.SILENT, **changes: Any) -> Facts:
    """A machine behind a NAT that shows these to its witnesses."""
    peers = tuple(
        witness(n, seen=place, sent_from=Place(OWN, PORT), dialled={PORT: dialled})
        for n, place in enumerate(seen)
    )
    return replace(HEALTHY, hosts=(OWN,), peers=peers, **changes)


def everyone(facts: Facts = HEALTHY, **changes: Any) -> Facts:
    """The same, with each peer's facts changed."""
    return replace(facts, peers=tuple(replace(peer, **changes) for peer in facts.peers))


def findings(facts: Facts) -> list[Finding]:
    return explain(facts, conclude(facts))


def finding(facts: Facts, topic: str) -> Finding:
    """The only finding of a topic."""
    (found,) = (f for f in findings(facts) if f.topic == topic)
    return found
