"""What a link does to bytes: delay, jitter, loss, and how fast one connection can be at best.

A *path* is one direction between two machines. Packets are lost independently, or in bursts
(Gilbert-Elliott: the path is bad for a while, and then loses most). Transports are reliable, so
loss costs time, never content: small messages wait for a retransmission, and bulk goes at the rate
that congestion control reaches (`goodput_bps`).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

PACKET_BYTES: Final = 1200  # QUIC's, and close to TCP's through tunnels
RTO_S_MIN: Final = 0.2  # Linux: a lost last packet is sent again after this, or ...
RTO_RTTS: Final = 1.5  # ... after a little more than a round trip where that is longer
TRIES_MAX: Final = 6  # then the caller's deadline has passed anyway


@dataclass(frozen=True, kw_only=True)
class PathSpec:
    """One direction between two machines."""

    latency_s: float
    """One way, without any waiting in queues."""
    jitter_s: float = 0.0
    """Every message is up to this much later."""
    loss: float = 0.0
    """Share of packets lost, 0 to 0.5."""
    burst_every_s: float = 0.0
    """Mean time between bursts; 0: none."""
    burst_s: float = 0.0
    """Their mean length."""
    burst_loss: float = 0.3
    """Share of packets lost inside one."""


def goodput_bps(rtt_s: float, loss: float) -> float:
    """Bits per second that one connection with loss-based congestion control reaches at best.

    The larger of two models, as CUBIC has a TCP-friendly region: Reno with its time-outs (Padhye,
    Firoiu, Towsley and Kurose, "Modeling TCP throughput", 1998, eq. 31, every packet acknowledged)
    and CUBIC (RFC 9438, section 5.1, with C = 0.4 and beta = 0.7). Infinite without loss: then
    only the lines limit.
    """
    if loss <= 0:
        return math.inf
    rtt_s = max(rtt_s, 1e-4)
    rto_s = max(RTO_S_MIN, RTO_RTTS * rtt_s)
    waits_s = rtt_s * math.sqrt(2 * loss / 3)
    waits_s += rto_s * min(1.0, 3 * math.sqrt(3 * loss / 8)) * loss * (1 + 32 * loss**2)
    cubic = 1.054 * (rtt_s / loss) ** 0.75 / rtt_s
    return 8.0 * PACKET_BYTES * max(1 / waits_s, float(cubic))


class Path:
    """One direction's state: bursts, and when its connection has room again."""

    def __init__(self, spec: PathSpec, rng: random.Random) -> None:
        self.spec = spec
        self.free_s = -math.inf
        """When what one connection carries at best will have left."""
        self._rng = rng
        self._bad = False
        self._turn_s: float | None = None
        """When the next burst begins, or this one ends."""
        self._clear_bps = goodput_bps(2 * spec.latency_s, spec.loss)
        self._burst_bps = goodput_bps(2 * spec.latency_s, max(spec.loss, spec.burst_loss))

    def loss_at(self, now_s: float) -> float:
        """Share of packets lost now; asked with times that do not go back."""
        spec = self.spec
        if spec.burst_every_s <= 0:
            return spec.loss
        if self._turn_s is None:
            self._turn_s = now_s + self._draw_s(spec.burst_every_s)
        while self._turn_s <= now_s:
            self._bad = not self._bad
            self._turn_s += self._draw_s(spec.burst_s if self._bad else spec.burst_every_s)
        return max(spec.loss, spec.burst_loss) if self._bad else spec.loss

    def _draw_s(self, mean_s: float) -> float:
        return max(1e-3, round(self._rng.expovariate(1 / mean_s), 6))

    def rate_bps(self, now_s: float) -> float:
        """What one connection reaches now."""
        self.loss_at(now_s)
        return self._burst_bps if self._bad else self._clear_bps

    def delay_s(self, size: int, now_s: float) -> float:
        """How long a small message of `size` bytes is on its way, retransmissions included."""
        spec = self.spec
        delay_s = spec.latency_s
        if spec.jitter_s > 0:
            delay_s += spec.jitter_s * self._rng.random()
        loss = self.loss_at(now_s)
        if loss > 0:
            lost = 1 - (1 - loss) ** max(1, -(-size // PACKET_BYTES))
            wait_s = max(RTO_S_MIN, 2 * RTO_RTTS * spec.latency_s)
            for _ in range(TRIES_MAX):
                if self._rng.random() >= lost:
                    break
                delay_s += wait_s
                wait_s *= 2
                lost = loss  # of several packets hardly ever more than one is: that one goes again
        return round(delay_s, 7)  # the same on every machine, whatever its libm's last bit


class Line:
    """One direction of a machine's own connection: bulk in turn, control ahead of it."""

    def __init__(self, bps: float) -> None:
        self.bps = bps
        self.free_s = -math.inf
        self.bytes = 0

    def bulk(self, size: int, now_s: float) -> tuple[float, float]:
        """Book `size` bytes: when their turn begins and ends."""
        start_s = max(self.free_s, now_s)
        self.free_s = start_s + 8 * size / self.bps
        self.bytes += size
        return start_s, self.free_s

    def control(self, size: int, now_s: float) -> float:
        """Send `size` bytes at once: seconds until they have left. Bulk waits the longer."""
        seconds = 8 * size / self.bps
        if self.free_s > now_s:
            self.free_s += seconds
        self.bytes += size
        return seconds
