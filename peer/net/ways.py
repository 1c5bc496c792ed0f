"""The way to each peer: found, held while it is in use, and made shorter where that is possible.

A peer that is not connected is dialled at its addresses, those through relays included; where that
does not succeed soon, somebody who knows it is asked to send it to us, and both go on until there
is a connection or no time left. A pair that talks through a relay tries to do without, at first at
once and then more and more seldom: whoever can be reached is dialled by the other one, and between
two routers each lets the other's dial in (`punch`).

A daemon that has a connection makes no second one, so the relayed one is cut first. That is done
only when nothing is in progress on it, neither here nor, by its own word, at the other side
(`Cut`). What is new waits for that moment, and the dial that follows has the relay among its
addresses. Should our daemon be unable to dial then, which may last some seconds (see
`Libp2pTransport._dial`), the other side's is asked to.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from peer.net.calls import report
from peer.net.libp2p import Libp2pTransport
from peer.net.multiaddress import at, is_relayed, peer_of, place_of, relay_in
from peer.net.pairs import Change, Pair
from peer.net.punch import listens, poke
from peer.net.reach import Come, Coming, Cut, Introduce, read_agreed, read_coming, write_question
from peer.net.transport import TransportError
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.types import PeerId

FETCH_AFTER_S: Final = 0.7  # a dial over 200 ms needs 0.6 s; the daemon tries relays after 0.5 s
FETCH_AGAIN_S: Final = 1.0
DIAL_AGAIN_S: Final = 1.0  # what the daemon dialled in vain it leaves alone for 5 s, by itself
INTRODUCERS_MAX: Final = 3
INTRODUCE_TIMEOUT_S: Final = 3.0
PROBE_S: Final = 0.8
PROBES_MAX: Final = 3
SWITCH_S: Final = 2.5  # between cutting one connection and having the other
DRAIN_S: Final = 0.5  # a call that is in progress ends in that time, or the change has to wait
AGREE_S: Final = 2.0  # a round trip through a relay, and a drain; a yes that comes later is none
HOLD_S: Final = 5.0
"""A yes holds for that long: for those two seconds, and for three that a busy machine may take to
tell its daemon to cut."""
POLL_S: Final = 0.05
AGAIN_S: Final = (5.0, 30.0, 120.0, 600.0, 3600.0)  # after tries in vain; then every hour
BUSY_AGAIN_S: Final = 3.0
REFUSED_AGAIN_S: Final = AGAIN_S[:2]  # it was busy there, which passes
TALKED_S: Final = 120.0  # whom we have not talked to for so long, we leave as it is
TASKS_MAX: Final = 64

Told = Callable[[str], None]


class Ways:
    """See above. `reachable`: whether others can dial us."""

    def __init__(
        self, inner: Libp2pTransport, host: str, reachable: Callable[[], bool], tell: Told
    ) -> None:
        self._inner = inner
        self._host = "127.0.0.1" if host == "localhost" else host
        self._reachable = reachable
        self._tell = tell
        self._pairs: OrderedDict[PeerId, Pair] = OrderedDict()
        """Longest unused first."""
        self._tasks: set[asyncio.Task[None]] = set()

    def relayed(self) -> list[PeerId]:
        """Peers that we talk to through a relay."""
        now_s = asyncio.get_running_loop().time()
        return [
            peer
            for peer, pair in self._pairs.items()
            if pair.direct is False and pair.talked_s > now_s - TALKED_S
        ]

    @contextmanager
    def talking(self, peer: PeerId) -> Iterator[None]:
        """While a call from or to `peer` is in progress, or a stream is being opened."""
        with self._of(peer).talking():
            yield

    async def ready(self, peer: PeerId, timeout_s: float, *, bulk: bool = False) -> None:
        """See to a connection. `bulk`: much will go over it, so look for a short way first.

        Raises:
            TransportError: no way is found.
        """
        loop = asyncio.get_running_loop()
        pair = self._of(peer)
        pair.talked_s = loop.time()
        give_up_s = loop.time() + timeout_s
        await self._joined(peer, pair, give_up_s, bulk=bulk)
        if bulk and not pair.direct and not self._inner.streams_with(peer):
            if loop.time() >= pair.not_before_s:
                self._look_for_shorter(peer, pair)
            wait_s = min(SWITCH_S, timeout_s / 2)
            await pair.until(lambda: not pair.improving, loop.time() + wait_s)
            await self._joined(peer, pair, give_up_s, bulk=bulk)

    async def _joined(self, peer: PeerId, pair: Pair, give_up_s: float, *, bulk: bool) -> None:
        """A connection on which something may begin: for a stream, one that is not cut."""
        loop = asyncio.get_running_loop()
        while True:
            await pair.until(lambda: not pair.changes, min(loop.time() + SWITCH_S, give_up_s))
            if bulk and not await pair.until(lambda: not pair.cutting, give_up_s):
                raise TransportError(peer, "its connection is just being made anew")
            if not self._inner.is_connected(peer):
                pair.direct = None
                known = self._inner.known(peer)
                if known:
                    await self._connect(peer, known, max(give_up_s - loop.time(), 0.01))
            if not (bulk and pair.cutting):  # meanwhile
                return

    def lost(self, peer: PeerId) -> None:
        """A call to `peer` failed: through another relay it may go, but not while the daemon takes
        a dead connection for a live one. What begins next waits until that is cut."""
        pair = self._of(peer)
        if pair.direct is not False or pair.changes or self._in_use(peer, pair):
            return
        change = ExitStack()
        change.enter_context(pair.change(Change(cuts=True)))
        if self._spawn(self._leave(peer, change), f"leaving the way to {peer}") is None:
            change.close()

    async def _leave(self, peer: PeerId, change: ExitStack) -> None:
        with change:
            await self._inner.disconnect(peer)

    def tend(self, connections: Mapping[PeerId, list[str]]) -> None:
        """What connections there are now: look for shorter ways where it is time."""
        now_s = asyncio.get_running_loop().time()
        for peer, pair in self._pairs.items():
            ends = connections.get(peer)
            if not ends:
                continue
            pair.direct = not all(map(is_relayed, ends))
            if pair.direct:
                pair.failures, pair.not_before_s = 0, 0.0
            elif now_s >= pair.not_before_s and pair.talked_s > now_s - TALKED_S:
                self._look_for_shorter(peer, pair)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # ── a connection where there is none ─────────────────────────────────────────────────

    async def _connect(self, peer: PeerId, known: list[str], timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + timeout_s
        dial = asyncio.ensure_future(self._inner.dial(peer, known, timeout_s))
        try:
            await asyncio.wait({dial}, timeout=min(FETCH_AFTER_S, timeout_s / 2))
            if dial.done() and dial.exception() is None:
                return
            fetch = asyncio.ensure_future(self._fetch(peer, give_up_s))
            reason = f"no answer within {timeout_s:g} s"
            both: set[asyncio.Future[Any]] = {dial, fetch}
            try:
                while both and loop.time() < give_up_s:
                    done, both = await asyncio.wait(
                        both,
                        timeout=give_up_s - loop.time(),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    if fetch in done and fetch.exception() is None and fetch.result():
                        return
                    if dial in done:
                        if dial.exception() is None:
                            return
                        reason = str(getattr(dial.exception(), "reason", dial.exception()))
                        again_s = loop.time() + DIAL_AGAIN_S
                        if again_s < give_up_s:
                            dial = asyncio.ensure_future(
                                self._dial_at(again_s, peer, known, give_up_s)
                            )
                            both.add(dial)
            finally:
                fetch.cancel()
                await asyncio.wait({fetch})
            raise TransportError(
                peer, f"neither its addresses nor an introduction lead to it ({reason})"
            )
        finally:
            dial.cancel()
            with contextlib.suppress(TransportError, ValueError, asyncio.CancelledError):
                await dial

    async def _dial_at(
        self, begin_s: float, peer: PeerId, known: list[str], give_up_s: float
    ) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(begin_s - loop.time())
        await self._inner.dial(peer, known, max(give_up_s - loop.time(), 0.01))

    async def _fetch(self, peer: PeerId, give_up_s: float) -> bool:
        """Have it sent to us by somebody who knows it; whether there is a connection then.

        It may also come by itself meanwhile: the daemon does not tell a dial that is under way.
        """
        loop = asyncio.get_running_loop()
        while loop.time() < give_up_s:
            for introducer in await self._introducers(peer):
                if peer in await self._inner.connections():
                    return True
                wait_s = min(INTRODUCE_TIMEOUT_S, give_up_s - loop.time())
                coming = await self._ask(introducer, peer, wait_s) if wait_s > 0 else None
                if coming is None:
                    continue
                if coming.dials and await self._comes(peer, min(give_up_s, loop.time() + SWITCH_S)):
                    return True
                if coming.opened and coming.place and not coming.dials:
                    with contextlib.suppress(TransportError, ValueError):
                        await self._inner.dial(peer, [coming.place], SWITCH_S)
                        return True
            if await self._comes(peer, min(give_up_s, loop.time() + FETCH_AGAIN_S)):
                return True
        return False

    async def _introducers(self, peer: PeerId) -> list[PeerId]:
        """Its relays and ours, and then anybody whom we reach directly."""
        connections = await self._inner.connections()
        wanted: list[PeerId] = []
        for address in (*self._inner.known(peer), *self._inner.addresses()):
            relay = relay_in(address)
            if relay is not None:
                with contextlib.suppress(ValueError):
                    wanted.append(peer_of(relay))
        direct = [p for p, ends in connections.items() if not all(map(is_relayed, ends))]
        found = [p for p in dict.fromkeys((*wanted, *direct)) if p in connections and p != peer]
        return found[:INTRODUCERS_MAX]

    async def _ask(
        self, introducer: PeerId, peer: PeerId, timeout_s: float, *, opened: bool = False
    ) -> Coming | None:
        addresses = tuple(self._inner.addresses()[: limits.ADDRESSES_MAX])
        wish = Introduce(peer, self._reachable(), opened, addresses)
        try:
            coded = await self._inner.call(introducer, write_question(wish), timeout_s)
            return read_coming(introducer, coded)
        except (TransportError, RemoteProtocolError):
            return None

    async def _comes(self, peer: PeerId, give_up_s: float) -> bool:
        """Wait for the connection that `peer` makes."""
        loop = asyncio.get_running_loop()
        while loop.time() < give_up_s:
            if peer in await self._inner.connections():
                return True
            await asyncio.sleep(POLL_S)
        return False

    # ── a shorter way ────────────────────────────────────────────────────────────────────

    def _look_for_shorter(self, peer: PeerId, pair: Pair) -> None:
        if not pair.improving and not pair.changes:
            pair.improving = True
            if self._spawn(self._improve(peer, pair), f"shorter way to {peer}") is None:
                pair.improving = False

    async def _improve(self, peer: PeerId, pair: Pair) -> None:
        """Try to do without the relay that we talk to `peer` through. Never raises for a peer."""
        loop = asyncio.get_running_loop()
        try:
            ends = (await self._inner.connections()).get(peer, [])
            if not ends:
                return
            pair.direct = not all(map(is_relayed, ends))
            if pair.direct:
                return
            if self._inner.streams_with(peer):
                pair.not_before_s = loop.time() + BUSY_AGAIN_S
                return
            tried = await self._shorten(peer, pair, ends)
            ends = (await self._inner.connections()).get(peer, [])
            pair.direct = bool(ends) and not all(map(is_relayed, ends))
            if pair.direct:
                pair.failures, pair.not_before_s = 0, 0.0
                self._tell(f"a direct way to {peer} was found")
            else:
                waits_s = AGAIN_S if tried else REFUSED_AGAIN_S
                wait_s = waits_s[min(pair.failures, len(waits_s) - 1)]
                pair.failures += 1
                pair.not_before_s = loop.time() + wait_s
        finally:
            pair.improving = False
            pair.tell()

    async def _shorten(self, peer: PeerId, pair: Pair, ends: list[str]) -> bool:
        """False: it was not the moment."""
        known = self._inner.known(peer)
        way_back = [address for address in known if is_relayed(address)]
        open_ = await self._open_places(known)
        if open_:
            return await self._switch(peer, pair, [*map(at, open_), *way_back])
        relay = next((r for end in ends if (r := relay_in(end))), None)
        try:
            introducer = peer_of(relay) if relay is not None else None
        except ValueError:
            introducer = None
        if introducer is None:
            return True
        coming = await self._ask(introducer, peer, INTRODUCE_TIMEOUT_S)
        if coming is not None and coming.opened and coming.place and way_back:
            if not await self._switch(peer, pair, [coming.place, *way_back]):
                return False
            # A daemon leaves alone for a while what it dialled in vain before. The other one's may
            # not have: the same the other way round.
            ends = (await self._inner.connections()).get(peer, [])
            if ends and all(map(is_relayed, ends)) and self._poke(place_of(coming.place)):
                coming = await self._ask(introducer, peer, INTRODUCE_TIMEOUT_S, opened=True)
        if coming is not None and coming.dials:
            with pair.change(Change(theirs=True)) as change:
                await self._until_made_anew(peer, pair, change, SWITCH_S)
        return True

    async def _open_places(self, addresses: list[str] | tuple[str, ...]) -> list[tuple[str, int]]:
        """Those where a daemon answers us, not counting this machine's own."""
        own = {place_of(address) for address in self._inner.addresses()}
        places = [
            place
            for place in dict.fromkeys(map(place_of, addresses))
            if place is not None and place not in own and _is_a_hosts(place[0])
        ][:PROBES_MAX]
        answers = await asyncio.gather(*(listens(place, PROBE_S) for place in places))
        return [place for place, answer in zip(places, answers, strict=True) if answer]

    async def _switch(self, peer: PeerId, pair: Pair, addresses: list[str]) -> bool:
        """Cut the connection and dial anew, at a moment when nobody uses it; else False."""
        if pair.held:
            return False
        with pair.change(Change(cuts=True)) as change:
            await self._drained(pair)
            if self._in_use(peer, pair) or not await self._agrees(peer):
                return False
            if self._in_use(peer, pair) or pair.held:  # by now
                return False
            await self._inner.disconnect(peer)
            change.cuts = False
            pair.tell()
            try:
                await self._inner.dial(peer, addresses, SWITCH_S)
            except (TransportError, ValueError):
                with contextlib.suppress(TransportError):  # whoever cuts makes it whole again
                    await self._connect(peer, self._inner.known(peer), SWITCH_S)
        return True

    async def _agrees(self, peer: PeerId) -> bool:
        """Whether it says that nothing is in progress there, and begins nothing for `HOLD_S`.

        Only it knows what it has opened that did not arrive here yet.
        """
        try:
            coded = await self._inner.call(peer, write_question(Cut()), AGREE_S)
            return read_agreed(peer, coded).yes
        except (TransportError, RemoteProtocolError):
            return False

    async def _drained(self, pair: Pair) -> None:
        await pair.until(lambda: not pair.calls, asyncio.get_running_loop().time() + DRAIN_S)

    def _in_use(self, peer: PeerId, pair: Pair) -> bool:
        return bool(pair.calls or self._inner.streams_with(peer))

    # ── being sought ─────────────────────────────────────────────────────────────────────

    async def meet(self, introducer: PeerId, come: Come) -> Coming:
        """`come.peer` wants a connection with us: do our part.

        Raises:
            RemoteProtocolError: not now.
        """
        peer = PeerId(come.peer)
        if peer == self._inner.peer_id:
            raise RemoteProtocolError(introducer, "I am that peer")
        pair = self._of(peer)
        ends = (await self._inner.connections()).get(peer, [])
        if ends and not all(map(is_relayed, ends)):
            return Coming(dials=False, opened=False, place="")
        if come.opened:  # the first way did not lead there
            soon_s = asyncio.get_running_loop().time() + DRAIN_S
            await pair.until(lambda: not pair.changes, soon_s)
        both_ask = pair.improving and self._inner.peer_id < peer
        cut_there = not ends and pair.held and not pair.switching  # and not made anew
        if (both_ask or pair.changes) and not cut_there:
            raise RemoteProtocolError(introducer, "it is being tried from here")
        if not ends:
            where = [a for a in come.addresses if come.reachable or is_relayed(a)]
            opened = self._poke(place_of(come.place))
            dials = bool(where) and self._spawn(self._dial(peer, where), f"to {peer}") is not None
            return Coming(dials, opened, "")
        if self._in_use(peer, pair):
            raise RemoteProtocolError(introducer, "in the middle of talking")
        if come.reachable or (come.opened and come.place):
            where = [come.place]
            if come.reachable:
                where = [at(place) for place in await self._open_places(come.addresses)]
            if not where:
                return Coming(dials=False, opened=False, place="")
            back = [a for a in (*self._inner.known(peer), *come.addresses) if is_relayed(a)]
            switch = self._go(peer, pair, [*where, *dict.fromkeys(back)])
            return Coming(self._spawn(switch, f"to {peer}") is not None, opened=False, place="")
        held = self._poke(place_of(come.place)) and self._hold(
            peer, pair, Change(theirs=True), SWITCH_S
        )
        return Coming(dials=False, opened=held, place="")

    async def agree(self, peer: PeerId) -> bool:
        """`peer` wants to cut the relayed connection between us and to dial anew. Yes: nothing is
        in progress on it, and nothing begins until it was cut and is there again, or for `HOLD_S`.
        """
        pair = self._of(peer)
        ends = (await self._inner.connections()).get(peer, [])
        if not ends or not all(map(is_relayed, ends)):
            return False
        if pair.switching and self._inner.peer_id < peer:
            return False  # both want to, and one of them has to give way
        with pair.change(Change(theirs=True, cuts=True)):
            await self._drained(pair)
            if self._in_use(peer, pair):
                return False
            return self._hold(peer, pair, Change(theirs=True, cuts=True), HOLD_S)

    def _poke(self, place: tuple[str, int] | None) -> bool:
        if place is None or not _is_a_hosts(place[0]) or not self._inner.port:
            return False
        return poke(self._host, self._inner.port, place)

    async def _dial(self, peer: PeerId, addresses: list[str]) -> None:
        with contextlib.suppress(TransportError, ValueError):
            await self._inner.dial(peer, addresses, limits.CONNECT_TIMEOUT_S)

    async def _go(self, peer: PeerId, pair: Pair, addresses: list[str]) -> None:
        await self._switch(peer, pair, addresses)

    def _hold(self, peer: PeerId, pair: Pair, change: Change, wait_s: float) -> bool:
        """From now on nothing new begins while the other side changes the connection."""
        stack = ExitStack()
        stack.enter_context(pair.change(change))
        work = self._held(peer, pair, change, wait_s, stack)
        if self._spawn(work, f"held by {peer}") is None:
            stack.close()
            return False
        return True

    async def _held(
        self, peer: PeerId, pair: Pair, change: Change, wait_s: float, stack: ExitStack
    ) -> None:
        with stack:
            await self._until_made_anew(peer, pair, change, wait_s)

    async def _until_made_anew(
        self, peer: PeerId, pair: Pair, change: Change, wait_s: float
    ) -> None:
        """Until the connection is direct, or was cut and is there again; at most `wait_s`."""
        give_up_s = asyncio.get_running_loop().time() + wait_s
        cut = False
        while asyncio.get_running_loop().time() < give_up_s:
            ends = (await self._inner.connections()).get(peer, [])
            if ends and (cut or not all(map(is_relayed, ends))):
                return
            if not ends and not cut:
                cut, change.cuts = True, False
                pair.tell()
            await asyncio.sleep(POLL_S)

    # ── inside ───────────────────────────────────────────────────────────────────────────

    def _of(self, peer: PeerId) -> Pair:
        pair = self._pairs.pop(peer, None) or Pair()
        self._pairs[peer] = pair
        if len(self._pairs) > limits.KNOWN_PEERS_MAX:
            for other, old in self._pairs.items():
                if not old.calls and not old.improving and not old.changes and old is not pair:
                    del self._pairs[other]
                    break
        return pair

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None] | None:
        if len(self._tasks) >= TASKS_MAX:
            work.close()
            return None
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        report(task)


def _is_a_hosts(host: str) -> bool:
    ip = ipaddress.ip_address(host)
    return not (ip.is_loopback or ip.is_multicast or ip.is_unspecified)
