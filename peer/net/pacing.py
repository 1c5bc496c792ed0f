"""How fast each lane sends, so that what is small and urgent finds short queues on the way.

A line's queue is shared by all that goes over it: where bulk fills it, every heartbeat waits behind
bulk, and where it overflows heartbeats are lost and said again after a second. TCP does one or the
other: cubic fills queues until they overflow, and BBR keeps them short for one flow, but not for
the dozen flows of a round on a line that holds eight packets. So each lane watches how much longer
its round trips are than the shortest to the same host (LEDBAT, RFC 6817): while that is more than a
little, it sends less, and the kernel spaces its packets out (`SO_MAX_PACING_RATE`). Loss alone
slows nothing down, since a radio link loses packets with empty queues; loss beside a queue says
that the queue is a short one, and makes us content with less of it.

That is for thin lines. Until a queue lasts while all lanes together carry little, nothing is held
back. Lanes know together what the line has carried, and share it: who begins takes its part from
the others, and who has sent for long leaves most of the line to those that have not: rounds go
before the transfer of a state. The owner's own traffic fills queues too, and ours gives way to it,
down to a small share of what a lane could do.
"""

from __future__ import annotations

import math
import socket
import struct
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self

from protocols import limits

TICK_S: Final = 0.2  # between two looks: a few round trips, and a rate over some packets
QUEUE_S: Final = 0.1  # waited for on the way: RFC 6817's most; a heartbeat there and back feels 0.2
QUEUE_SHORT_S: Final = 0.05  # the same where packets are lost as well: four at 1 Mbit/s
LOSS_MUCH: Final = 0.02
LOSS_MEMORY: Final = 0.8  # kept of the loss so far at each look: some 5 looks count
GROWTH: Final = 0.2  # a look with an empty queue, while more is wanted: 40 ms more of it at most
LEVEL: Final = 0.04  # a look, of who has more than its share of a busy line
LEVEL_QUEUE: Final = 0.75  # busy: with a quarter of the queue that we want
TILT: Final = 1.5  # so much more or less of that for who has less or more than its share
CUT: Final = 0.2  # a look with twice the queue that we want, or more
LASTING_LOOKS: Final = 3  # a queue: who begins makes a short one, and what arrives so far is little
FIRST_SHARE: Final = 0.8  # of what just arrived, when a queue is seen for the first time
FLOOR_SHARE: Final = 1 / 32  # of the best rate: 32 lanes at one thin line, or a busy owner
FLOOR_BPS: Final = 64_000  # a record of TLS takes two seconds then
RATE_MEMORY: Final = 0.5  # of a rate at each look: at the floor a packet passes in every look
IDLE_SHARE: Final = 0.1  # who sends less than this of what it may, and has nothing more, rests
USED_SHARE: Final = 0.6  # who sends less than this of what it may has no use for more
PAUSE_S: Final = 1.0  # who was silent for so long begins anew
BASE_S: Final = 300.0  # the shortest round trip counts this long to twice as long; routes change
LINE_S: Final = 600.0  # what the line carried is remembered so long to twice as long
LONG_S: Final = 2.5  # who has sent what the whole line carries in so long, without a pause, is long
LONG_BYTES_MIN: Final = 2**17  # and no less than this, whatever the line
LONG_WEIGHT: Final = 1 / 8  # of the line's share of one that is short, where both send
LONG_QUEUE: Final = 0.5  # of the queue that others are content with: these may come from elsewhere
THIN_BPS: Final = 15e6  # on wider lines a dozen flows of BBR leave room in most queues
WINDOW_S: Final = 1.0  # in which what a line carries is counted

_SO_MAX_PACING_RATE: Final = 47  # asm-generic/socket.h; Python does not name it
_RATE: Final = struct.Struct("@L")
_UNLIMITED: Final = (1 << 8 * _RATE.size) - 1
# linux/tcp.h, struct tcp_info: unacked, rtt, total_retrans, bytes_acked, notsent_bytes, min_rtt,
# data_segs_out.
_INFO: Final = struct.Struct("@24xI40xI28xI16xQ16xII4xI")
_QUICKACK: Final[int | None] = getattr(socket, "TCP_QUICKACK", None)
_OPTION: Final[int | None] = getattr(socket, "TCP_INFO", None)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the kernel knows of a connection at one moment."""

    now_s: float
    rtt_s: float
    """Smoothed."""
    least_rtt_s: float
    """The least of the last minutes."""
    acked: int
    """Bytes that the far side has confirmed, since the connection began."""
    sent: int
    """Packets with data, those sent again included."""
    again: int
    """Packets sent again."""
    flying: int
    """Packets that nobody has confirmed yet."""
    waiting: int
    """Bytes that the kernel has not sent yet."""

    @classmethod
    def of(cls, sock: socket.socket, now_s: float) -> Self | None:
        """None where this system does not tell."""
        if _OPTION is None:
            return None
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, _OPTION, _INFO.size)
            flying, rtt_us, again, acked, waiting, least_us, sent = _INFO.unpack(info)
        except (OSError, struct.error):
            return None
        return cls(now_s, rtt_us / 1e6, least_us / 1e6, acked, sent, again, flying, waiting)


def limit(sock: socket.socket, bits_per_s: float) -> None:
    """Have the kernel send at most so fast, where it can. Raises OSError where it can't."""
    rate = _UNLIMITED if math.isinf(bits_per_s) else int(bits_per_s / 8)
    sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, _RATE.pack(rate))


def acknowledge(sock: socket.socket) -> None:
    """Confirm at once what has come in and comes next, where this system can.

    TCP waits for up to 0.2 s for a second packet otherwise, and on a thin line that looks like a
    queue to the sender. The kernel forgets this after some packets.
    """
    if _QUICKACK is not None:
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)


class _Extreme:
    """The best of a figure over the last while, kept in two halves."""

    def __init__(self, keep_s: float, better: Callable[[float, float], float]) -> None:
        self._keep_s = keep_s
        self._better = better
        self._since_s = -math.inf
        self._now: float | None = None
        self._before: float | None = None

    def saw(self, value: float, now_s: float) -> None:
        self.best(now_s)
        self._now = value if self._now is None else self._better(self._now, value)

    def best(self, now_s: float) -> float | None:
        """None if nothing was seen for so long."""
        if now_s - self._since_s > self._keep_s:
            stale = now_s - self._since_s > 2 * self._keep_s
            self._since_s, self._before, self._now = now_s, None if stale else self._now, None
        found = [value for value in (self._now, self._before) if value is not None]
        return self._better(found[0], found[-1]) if found else None


class Line:
    """What the lanes of one peer know together. Touched by one event loop."""

    def __init__(self) -> None:
        self._bases: OrderedDict[str, _Extreme] = OrderedDict()
        """Host -> its shortest round trip; the longest unused first."""
        self._active: dict[Pace, float] = {}
        """Lanes that send now, and when each was last seen to."""
        self._carried = _Extreme(LINE_S, max)
        """Bits per second: the most that arrived of all lanes together in `WINDOW_S`."""
        self._arrived: deque[tuple[float, int]] = deque()
        """(when it was seen, bytes), of the last `WINDOW_S`."""
        self._filled = False
        """Whether it was seen full, and thin."""

    def pace(self, host: str) -> Pace:
        """Of a new lane to `host`."""
        return Pace(self, host)

    def base_s(self, host: str, least_s: float, now_s: float) -> float:
        """The shortest round trip to `host`, of all lanes to it and of those before them."""
        base = self._bases.pop(host, None) or _Extreme(BASE_S, min)
        self._bases[host] = base
        if len(self._bases) > limits.KNOWN_PEERS_MAX:
            self._bases.popitem(last=False)
        base.saw(least_s, now_s)
        return base.best(now_s) or least_s

    def carries_bps(self, now_s: float) -> float:
        """The most that arrived of all lanes together, as far as is known."""
        return self._carried.best(now_s) or 0.0

    def share_bps(self, pace: Pace, now_s: float) -> float:
        """An active lane's part of that."""
        total = sum(other.weight for other in self._active) or 1.0
        return max(FLOOR_BPS, self.carries_bps(now_s) * pace.weight / total)

    def fills(self, now_s: float) -> bool:
        """A queue was seen; whether it is that of a thin line, from now on."""
        if self.carries_bps(now_s) < THIN_BPS:
            self._filled = True
        return self._filled

    def is_thin(self, now_s: float) -> bool:
        """Whether it was seen full with less than `THIN_BPS`, and has not carried more since."""
        self._filled = self._filled and 0 < self.carries_bps(now_s) < THIN_BPS
        return self._filled

    def begin(self, pace: Pace, now_s: float) -> None:
        """A lane begins to send: on a thin line it gets its share of what the others have."""
        self._active.pop(pace, None)
        self._forget(now_s)
        others = list(self._active)
        self._active[pace] = now_s
        if not self.is_thin(now_s):
            pace.cap_bps = math.inf
            return
        pace.cap_bps = self.share_bps(pace, now_s)
        for other in others:
            share_bps = self.share_bps(other, now_s)
            other.cap_bps = max(FLOOR_BPS, min(other.cap_bps, share_bps))

    def arrived(self, n_bytes: int, now_s: float) -> None:
        """So much was confirmed to one of the lanes, in about `TICK_S`."""
        self._arrived.append((now_s, n_bytes))
        while self._arrived[0][0] <= now_s - WINDOW_S:
            self._arrived.popleft()
        self._carried.saw(8 * sum(n for _, n in self._arrived) / WINDOW_S, now_s)

    def sends(self, pace: Pace, now_s: float) -> None:
        """A lane has something to send."""
        self._active[pace] = now_s
        self._forget(now_s)

    def rests(self, pace: Pace) -> None:
        """A lane has next to nothing to send: the others need not leave it a share."""
        self._active.pop(pace, None)

    def _forget(self, now_s: float) -> None:
        for pace in [p for p, seen_s in self._active.items() if now_s - seen_s > PAUSE_S]:
            del self._active[pace]


class Pace:
    """How fast one lane may send."""

    def __init__(self, line: Line, host: str) -> None:
        self.host = host
        self.cap_bps = math.inf
        self.thin = False
        """The line is, as far as is known: BBR does no good on it."""
        self.rate_bps = 0.0
        """What arrives: the last second or so."""
        self.long = False
        """It has sent for long: a state's transfer, which may take its time, not a round's."""
        self._line = line
        self._last: Sample | None = None
        self._begun = 0
        """Bytes acknowledged before it began to send, after the last pause."""
        self._best_bps = 0.0
        self._loss = 0.0
        self._queue_s = 0.0
        self._looks = 0
        """In a row that saw more of a queue than we want."""

    @property
    def weight(self) -> float:
        """In the line's shares."""
        return LONG_WEIGHT if self.long else 1.0

    def look(self, sample: Sample) -> float:
        """The new `cap_bps`, after another look at the connection while it sends."""
        last, self._last = self._last, sample
        self.thin = self._line.is_thin(sample.now_s)
        base_s = self._line.base_s(self.host, sample.least_rtt_s, sample.now_s)
        seconds = sample.now_s - last.now_s if last is not None else 0.0
        if last is None or not 0 < seconds <= PAUSE_S:
            self._queue_s = self._loss = self.rate_bps = 0.0
            self._begun, self._looks = sample.acked, 0
            self.long = False
            self._line.begin(self, sample.now_s)
            return self.cap_bps
        if seconds < 2 * TICK_S:
            self._line.arrived(sample.acked - last.acked, sample.now_s)
        else:  # it had nothing to send for a moment
            self._begun = sample.acked
        now_bps = 8 * (sample.acked - last.acked) / seconds
        if self.rate_bps:
            now_bps = RATE_MEMORY * self.rate_bps + (1 - RATE_MEMORY) * now_bps
        self.rate_bps = now_bps
        self._best_bps = max(self._best_bps, self.rate_bps)
        sent = sample.sent - last.sent
        lost = (sample.again - last.again) / sent if sent > 0 else 0.0
        self._loss = LOSS_MEMORY * self._loss + (1 - LOSS_MEMORY) * min(1.0, lost)
        before_s, self._queue_s = self._queue_s, max(0.0, sample.rtt_s - base_s)
        long_bytes = LONG_S * self._line.carries_bps(sample.now_s) / 8
        self.long = sample.acked - self._begun > max(long_bytes, LONG_BYTES_MIN)
        wanted_s = QUEUE_SHORT_S if self._loss > LOSS_MUCH else QUEUE_S
        self._steer(wanted_s * (LONG_QUEUE if self.long else 1.0), before_s, sample)
        if sample.waiting or self.rate_bps > IDLE_SHARE * self.cap_bps:
            self._line.sends(self, sample.now_s)
        else:
            self._line.rests(self)
        return self.cap_bps

    def _steer(self, wanted_s: float, before_s: float, sample: Sample) -> None:
        excess = self._queue_s / wanted_s - 1
        thin = self._line.is_thin(sample.now_s)
        if not thin:
            self.cap_bps = math.inf
        if math.isinf(self.cap_bps):
            self._looks = self._looks + 1 if excess > 0 else 0
            if thin or (self._looks >= LASTING_LOOKS and self._line.fills(sample.now_s)):
                self.cap_bps = max(self._floor_bps, FIRST_SHARE * self.rate_bps)
            return
        over = self.cap_bps / self._line.share_bps(self, sample.now_s)
        if excess > 0:
            if self._queue_s > 0.95 * before_s:  # else the last cut is still at work
                cut = CUT * min(1.0, excess) * min(max(over, 1 / TILT), TILT)
                self.cap_bps = max(self._floor_bps, self.cap_bps * (1 - cut))
        elif sample.waiting or self.rate_bps > USED_SHARE * self.cap_bps:
            self.cap_bps *= 1 - GROWTH * excess * min(max(1 / over, 1 / TILT), TILT)
            if over > 1 and excess > -LEVEL_QUEUE:  # the line is busy: level out
                self.cap_bps *= 1 - LEVEL

    @property
    def _floor_bps(self) -> float:
        return max(FLOOR_BPS, FLOOR_SHARE * self._best_bps)
