"""What the peer's seat on this machine says: its past, its ports, whether it runs. Reads only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from peer.control import ask
from peer.doctor.facts import PortFacts
from peer.doctor.messages import place_of
from peer.errors import PeerError, UsageError
from peer.home import Memory, control_path, home_folder, read_memory, seats
from peer.net.laned import PORT_FILE
from peer.net.p2pd import port_is_free, remembered_port

BOOTSTRAP: Final = "bootstrap"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatFacts:
    """One seat, or the place where the first one would be."""

    folder: Path
    memory: Memory
    status: Mapping[str, Any]
    """What the peer that runs there says of itself; empty: none runs, or it says nothing."""
    running: bool

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the running peer."""
        found = self.status.get("addresses")
        return tuple(map(str, found)) if isinstance(found, list) else ()


def look(home: Path | None, name: str | None) -> SeatFacts:
    """The seat called `name`; else that of a running peer, else the first.

    Raises:
        UsageError: there is no seat of that name.
        StorageError: the folder can't be read.
    """
    known = [info for info in seats(home) if info.name != BOOTSTRAP or name == BOOTSTRAP]
    if name is not None:
        known = [info for info in known if info.name == name]
        if not known:
            raise UsageError(f"there is no seat {name[:40]!r} in {home_folder(home)}; leave --seat"
                             " away, or see `python -m peer identity`")  # fmt: skip
    info = next((info for info in known if info.running), known[0] if known else None)
    if info is None:
        folder = home_folder(home) / "seat-1"
        return SeatFacts(folder=folder, memory=Memory(), status={}, running=False)
    memory, _ = read_memory(info.folder)
    status: Mapping[str, Any] = {}
    if info.running:
        try:
            status = ask(control_path(info.folder), "status")
        except PeerError:  # only just starting, or frozen: its ports are taken all the same
            status = {}
    return SeatFacts(folder=info.folder, memory=memory, status=status, running=info.running)


def ports(seat: SeatFacts, host: str, port: int, lane_port: int) -> tuple[PortFacts, PortFacts]:
    """Whether libp2p's and the lane's ports can be had: chosen ones, or those of last time."""
    if seat.running and not port and not lane_port:
        places = [place for a in seat.addresses if (place := place_of(a)) is not None]
        lane = seat.status.get("lane")
        lane_now = lane.get("port") if isinstance(lane, dict) else 0
        return (
            _held(places[0].port if places else 0),
            _held(lane_now if isinstance(lane_now, int) else 0),
        )
    return (
        _port(host, port, remembered_port(seat.folder)),
        _port(host, lane_port, remembered_port(seat.folder, PORT_FILE)),
    )


def _held(port: int) -> PortFacts:
    return PortFacts(port=port, given=False, free=False, ours=True)


def _port(host: str, given: int, remembered: int) -> PortFacts:
    port = given or remembered
    try:
        free = port_is_free("127.0.0.1" if host == "localhost" else host, port)
    except OSError as error:
        return PortFacts(
            port=port, given=given != 0, free=False, ours=False, error=str(error.strerror or error)
        )
    return PortFacts(port=port, given=given != 0, free=free, ours=False)
