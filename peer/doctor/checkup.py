"""The quick part of the examination, beside a peer that has just joined: a few lines at most.

It asks a few of those who are connected anyway, once, and holds up nothing.
"""

from __future__ import annotations

import asyncio
from typing import Final

from peer.clock import SYSTEM, Clock
from peer.doctor import kernel
from peer.doctor.conclude import conclude
from peer.doctor.explain import explain
from peer.doctor.facts import Facts, PortFacts
from peer.doctor.findings import Level
from peer.doctor.messages import place_of
from peer.doctor.probes import Prober
from peer.doctor.serve import connection_by, seen_by
from peer.net.transport import Transport
from peer.observe import events as ev
from protocols.types import PeerId

WITNESSES_MAX: Final = 3
LINES_MAX: Final = 3
CHECK_S: Final = 60.0
TOPICS: Final = ("clock", "nat")
"""What the owner should hear at a start. Whether others can call, the network tells by itself
(`net/outside.py`); the rest is for `peer doctor`."""


async def check_up(
    transport: Transport, peers: list[PeerId], emit: ev.Listener, *, clock: Clock = SYSTEM
) -> None:
    """Ask `peers` what they see of us, and tell what is not well. Never raises for the network."""
    try:
        async with asyncio.timeout(CHECK_S):
            facts = await _facts(transport, peers[:WITNESSES_MAX], clock)
    except TimeoutError:
        return
    findings = [
        finding
        for finding in explain(facts, conclude(facts))
        if finding.topic in TOPICS and finding.level in (Level.WARNING, Level.ERROR)
    ]
    for finding in findings[:LINES_MAX]:
        level = "warning" if finding.level is Level.ERROR else "info"
        emit(ev.Notice(level, f"{finding.text} {finding.next}"))


async def _facts(transport: Transport, peers: list[PeerId], clock: Clock) -> Facts:
    seen, connection = seen_by(transport), connection_by(transport)
    addresses = transport.addresses()
    places = [place for a in addresses if (place := place_of(a)) is not None]
    port = places[0].port if places else 0
    probers = [
        Prober(transport, peer, next(iter(await seen(peer)), ""), connection, clock)
        for peer in peers
    ]
    await asyncio.gather(*(prober.greet() for prober in probers))
    ours = PortFacts(port=port, given=False, free=False, ours=True)
    return Facts(
        hosts=tuple(kernel.own_hosts()),
        libp2p=ours,
        lane=PortFacts(port=0, given=False, free=True, ours=False),
        running=True,
        addresses=tuple(addresses),
        peers=tuple(prober.facts for prober in probers),
        quick=True,
    )
