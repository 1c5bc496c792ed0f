"""Whether others can reach this peer, and what follows from it: through relays, or being one.

The peers that we dialled are asked to dial back. Their word for yes counts; for no it counts where
we reached them ourselves, for then they are in the open. libp2p's own inquiry (AutoNAT) needs
several servers and minutes, and its relays are found after three; asked like this it takes two
seconds, and the daemon is started again with the relays named.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from peer.net.daemon import Posture
from peer.net.libp2p import Libp2pTransport
from peer.net.multiaddress import is_relayed, peer_of, place_of, relay_in
from peer.net.reach import PORTS_MAX, Look, Seen, read_seen, write_question
from peer.net.reach_helper import seen_at
from peer.net.relays import RelayTable, fault_of_relay
from peer.net.transport import TransportError
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.types import PeerId

HELPERS_MAX: Final = 3
LOOK_CALL_S: Final = 4.0  # the far side tries for 1.5 s
LOOK_SOON_S: Final = 0.25  # while nobody could be asked
LOOK_AGAIN_S: Final = 15.0  # while there is no relay for us
LOOK_LATER_S: Final = 600.0  # routers are changed, and forwarded ports appear
RELAYS_MAX: Final = 3
"""Places booked at a time: one may vanish and one may be slow."""
RELAY_DIAL_S: Final = 3.0
RELAY_TESTS_MAX: Final = 24  # seven of twelve starts have the wrong limits, or fewer
CHANGE_S: Final = 20.0
BOOKED_S: Final = 5.0
BOOKED_POLL_S: Final = 0.1
WATCH_S: Final = 1.0
FILE: Final = "reach.json"

Told = Callable[[str, str], None]
"""(level, text)."""


class Verdict(StrEnum):
    """What is known of being reached."""

    UNKNOWN = "unknown"
    """Nobody was asked yet, or could say; taken for yes."""
    REACHABLE = "reachable"
    UNREACHABLE = "unreachable"


@dataclass(slots=True)
class Standing:
    """What `peer status` shows."""

    verdict: Verdict = Verdict.UNKNOWN
    seen_at: list[str] = field(default_factory=list)
    """Multiaddresses at which others see our connections."""
    symmetric: bool = False
    """They see different ports: nobody can be told where to expect us."""
    relaying: bool = False
    not_relaying: str = ""
    """Why not, where the owner wants it."""


class Outside:
    """Keeps the daemon's posture in keeping with the world. `wants`: the owner offers to relay."""

    def __init__(
        self, inner: Libp2pTransport, table: RelayTable, folder: Path, host: str, wants: bool,
        tell: Told,
    ) -> None:  # fmt: skip
        self.standing = Standing()
        self.dialled: set[PeerId] = set()
        """Whom we reached ourselves, at an address without a relay."""
        self._inner = inner
        self._table = table
        self._folder = folder
        self._host = host
        self._wants = wants
        self._tell = tell
        self._tested: Any = None
        """The daemon (hivemind's P2P) that was tested as a relay."""
        self._news = asyncio.Event()
        self._told_unreachable = False

    @property
    def reachable(self) -> bool:
        return self.standing.verdict is not Verdict.UNREACHABLE

    def reached(self, peer: PeerId) -> None:
        """We dialled `peer` without a relay, and it answered."""
        if peer not in self.dialled and len(self.dialled) < limits.KNOWN_PEERS_MAX:
            self.dialled.add(peer)
            self._news.set()

    def relays(self) -> list[PeerId]:
        """Through whom we are reached now."""
        found = []
        for address in self._inner.addresses():
            relay = relay_in(address)
            if relay is not None:
                with contextlib.suppress(ValueError):
                    found.append(peer_of(relay))
        return list(dict.fromkeys(found))

    def own_relay(self) -> list[str]:
        """Our addresses while we relay."""
        if not self.standing.relaying:
            return []
        direct = [a for a in self._inner.addresses() if not is_relayed(a)]
        return [a for a in direct if (p := place_of(a)) is None or _is_public(p[0])] or direct

    async def keep(self) -> None:
        """Look, change what has to be changed, and look again; until cancelled."""
        while True:
            wait_s = await self._turn()
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._watch()

    # ── looking ──────────────────────────────────────────────────────────────────────────

    async def _turn(self) -> float:
        """One look and what follows from it; when to look again."""
        if self._wants and not self._inner.posture.private:
            await self._see_to_relaying()
        helpers = await self._helpers()
        if not helpers:
            return LOOK_SOON_S
        before = self.standing.verdict
        seen = await self._ask(helpers)
        verdict = self._judge(seen)
        if verdict is Verdict.UNKNOWN:
            verdict = before
        self.standing.verdict = verdict
        if verdict is Verdict.UNREACHABLE:
            first, self._told_unreachable = not self._told_unreachable, True
            return await self._go_through_relays(first=first)
        self._told_unreachable = False
        if self._inner.posture.private:
            self._write(Posture())
            await self._change(Posture(relays=self._wants))
            if self._wants:
                await self._see_to_relaying()
        if verdict is Verdict.REACHABLE and before is not verdict:
            self._tell("info", "other peers can reach this one directly")
        return LOOK_LATER_S if verdict is Verdict.REACHABLE else LOOK_AGAIN_S

    async def _helpers(self) -> list[PeerId]:
        connections = await self._inner.connections()
        direct = [peer for peer in connections if seen_at(connections, peer) is not None]
        direct.sort(key=lambda peer: peer not in self.dialled)
        return direct[:HELPERS_MAX]

    async def _ask(self, helpers: list[PeerId]) -> dict[PeerId, Seen]:
        own = self._inner.addresses()
        places = [p for a in own if (p := place_of(a)) is not None]
        ports = tuple(dict.fromkeys((*(port for _, port in places), self._inner.port)))
        offers = tuple(self.own_relay()[: limits.ADDRESSES_MAX])
        question = write_question(Look(ports[:PORTS_MAX], bool(offers), offers))
        answers = await asyncio.gather(*(self._ask_one(h, question) for h in helpers))
        seen = {h: a for h, a in zip(helpers, answers, strict=True) if a is not None}
        now_s = asyncio.get_running_loop().time()
        for answer in seen.values():
            self._table.hear(answer.relays, self._inner.peer_id, now_s)
        return seen

    async def _ask_one(self, helper: PeerId, question: bytes) -> Seen | None:
        try:
            return read_seen(helper, await self._inner.call(helper, question, LOOK_CALL_S))
        except (TransportError, RemoteProtocolError):
            return None

    def _judge(self, seen: dict[PeerId, Seen]) -> Verdict:
        places = {h: p for h, s in seen.items() if (p := place_of(s.place)) is not None}
        # Who shares our own network sees less of what is between us and the world.
        if any(_is_public(host) for host, _ in places.values()):
            places = {h: p for h, p in places.items() if _is_public(p[0])}
        self.standing.seen_at = sorted({seen[h].place for h in places})
        ports: dict[str, set[int]] = {}
        for host, port in places.values():
            ports.setdefault(host, set()).add(port)
        self.standing.symmetric = any(len(found) > 1 for found in ports.values())
        if not places:
            return Verdict.UNKNOWN
        yes = sum(seen[h].reached for h in places)
        no = sum(not seen[h].reached and h in self.dialled for h in places)
        if yes == no == 0:
            return Verdict.UNKNOWN
        return Verdict.REACHABLE if yes >= no else Verdict.UNREACHABLE

    # ── being reached through relays ─────────────────────────────────────────────────────

    async def _go_through_relays(self, *, first: bool) -> float:
        loop = asyncio.get_running_loop()
        self.standing.relaying = False
        if self._wants:
            self.standing.not_relaying = "nobody outside can reach this peer"
        if first:
            where = ", ".join(self.standing.seen_at) or "the outside"
            self._tell(
                "warning",
                f"nobody can reach port {self._inner.port} of this peer from outside (it is seen at"
                f" {where}): it goes through relays and will not aggregate while others can;"
                " forward the port in the router, or allow it in the firewall"
                + (", to relay for others, too" if self._wants else ""),
            )
        if self.relays():
            return LOOK_LATER_S
        found = await self._live_relays()
        if not found:
            if first:
                self._tell(
                    "warning",
                    "no relay is known yet: only those whom this peer dials can talk to it",
                )
            return LOOK_AGAIN_S
        posture = Posture(private=True, through=tuple(found))
        await self._change(posture)
        give_up_s = loop.time() + BOOKED_S
        while loop.time() < give_up_s and not self.relays():
            await asyncio.sleep(BOOKED_POLL_S)
            with contextlib.suppress(TransportError, TimeoutError):
                await self._inner.refresh_addresses()
        if not self.relays():
            for address in found:
                self._table.forget(peer_of(address))
            self._tell("warning", "no relay had a place for this peer; looking for others")
            return LOOK_AGAIN_S
        self._write(posture)
        named = ", ".join(self.relays())
        self._tell("info", f"this peer is reached through {named}")
        return LOOK_LATER_S

    async def _live_relays(self) -> list[str]:
        """Addresses of relays that answer now, the quickest first."""
        loop = asyncio.get_running_loop()
        known = {p: list(where) for p, where in self._table.addresses(loop.time()).items()}
        for address in self._inner.posture.through:
            known.setdefault(peer_of(address), []).append(address)
        tries = [
            asyncio.create_task(self._try_relay(peer, where), name=f"relay {peer}")
            for peer, where in list(known.items())[: 2 * RELAYS_MAX]
        ]
        found: list[str] = []
        try:
            for one in asyncio.as_completed(tries):
                answered = await one
                if answered is not None:
                    found.append(answered)
                if len(found) == RELAYS_MAX:
                    break
        finally:
            for task in tries:
                task.cancel()
            if tries:
                await asyncio.wait(tries)
        return found

    async def _try_relay(self, peer: PeerId, addresses: list[str]) -> str | None:
        """The address at which it answers and says that it relays."""
        try:
            await self._inner.dial(peer, addresses, RELAY_DIAL_S)
            question = write_question(Look((), offers=False, addresses=()))
            seen = read_seen(peer, await self._inner.call(peer, question, RELAY_DIAL_S))
        except (TransportError, RemoteProtocolError, ValueError):
            return None
        if not seen.offers:
            self._table.forget(peer)
            return None
        self.reached(peer)
        ends = (await self._inner.connections()).get(peer, [])
        there = {place_of(end) for end in ends}
        return next((a for a in addresses if place_of(a) in there), addresses[0])

    async def _watch(self) -> None:
        """Return when something happened that asks for another look."""
        missing = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await self._news.wait()
                    if not self.relays() and self.standing.verdict is not Verdict.REACHABLE:
                        return
                    self._news.clear()
            untested = self._daemon is not None and self._tested is not self._daemon
            if self._wants and untested and not self._inner.posture.private:
                return  # a new daemon may have the wrong limits again
            if not self._inner.posture.private:
                continue
            with contextlib.suppress(TransportError, TimeoutError):
                await self._inner.refresh_addresses()
            missing = 0 if self.relays() else missing + 1
            if missing > 1:
                return  # all are gone: find others, now

    # ── being one ────────────────────────────────────────────────────────────────────────

    @property
    def _daemon(self) -> Any:
        return self._inner.p2p

    async def _see_to_relaying(self) -> None:
        """Test what we offer, once for each daemon, and with another one where it fails."""
        if self._tested is self._daemon or self._daemon is None:
            return
        fault: str | None = "the network daemon is not running"
        for tries in range(RELAY_TESTS_MAX):
            if tries:
                await self._change(Posture(relays=True))
            self._tested = self._daemon
            fault = await fault_of_relay(self._inner, self._host)
            if fault is None:
                break
        was = self.standing.relaying
        self.standing.relaying = fault is None
        self.standing.not_relaying = fault or ""
        if fault is not None:
            self._tell("warning", f"this peer does not relay for others: {fault}")
        elif not was:
            self._tell("info", "this peer relays for those who can't be reached directly")

    # ── the daemon ───────────────────────────────────────────────────────────────────────

    async def _change(self, posture: Posture) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CHANGE_S):
                await self._inner.change(posture)

    def _write(self, posture: Posture) -> None:
        """For the next start: then it need not be found out again."""
        plain = {"private": posture.private, "through": list(posture.through)}
        with contextlib.suppress(OSError):
            (self._folder / FILE).write_text(json.dumps(plain))


def remembered(folder: Path, *, relays: bool) -> Posture:
    """How the daemon stood last time; `relays`: the owner offers to relay."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads((folder / FILE).read_text()[:8192])
        through = tuple(a for a in found["through"] if isinstance(a, str) and peer_of(a))
        if found["private"] is True and through:
            return Posture(private=True, through=through[:RELAYS_MAX])
    return Posture(relays=relays)


def _is_public(host: str) -> bool:
    return ipaddress.ip_address(host).is_global
