"""Lanes share a line and keep its queue short, whatever a queue looks like; the kernel obeys."""

from __future__ import annotations

import math
import socket
from dataclasses import dataclass

import pytest

from peer.net.pacing import (
    FLOOR_BPS,
    LINE_S,
    PAUSE_S,
    QUEUE_S,
    THIN_BPS,
    TICK_S,
    Line,
    Pace,
    Sample,
    limit,
)

RTT_S = 0.04
PACKET_BITS = 12_000


@dataclass
class Lane:
    pace: Pace
    acked: float = 0.0
    sent: float = 0.0
    again: float = 0.0

    def wants_bps(self, line_bps: float) -> float:
        """Left alone, TCP soon has more on the way than the line takes."""
        return min(self.pace.cap_bps, 1.25 * line_bps)


class Bottleneck:
    """A line with a queue of so many seconds, in fluid: what does not fit is lost."""

    def __init__(self, bits_per_s: float, buffer_s: float, loss: float = 0.0) -> None:
        self.rate, self.buffer_s, self.loss = bits_per_s, buffer_s, loss
        self.now_s, self.queue_s, self.most_s, self.carried = 0.0, 0.0, 0.0, 0.0
        self.line = Line()
        self.lanes: list[Lane] = []

    def add(self) -> Lane:
        self.lanes.append(Lane(self.line.pace(f"h{len(self.lanes)}")))
        return self.lanes[-1]

    def run(self, seconds: float) -> None:
        self.most_s = self.carried = 0.0
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            for lane in self.lanes:
                lane.pace.look(self._sample(lane))
            offered = sum(lane.wants_bps(self.rate) for lane in self.lanes)
            full = self.queue_s + TICK_S * (offered / self.rate - 1)
            dropped = max(0.0, full - self.buffer_s) * self.rate / (offered * TICK_S)
            through = min(offered * (1 - dropped), self.rate * (1 + self.queue_s / TICK_S))
            self.queue_s = min(max(0.0, full), self.buffer_s)
            self.most_s = max(self.most_s, self.queue_s)
            arrived = min(through, self.rate) * (1 - self.loss)
            self.carried += arrived * TICK_S
            for lane in self.lanes:
                share = lane.wants_bps(self.rate) / offered
                lane.acked += arrived * share * TICK_S / 8
                packets = lane.wants_bps(self.rate) * TICK_S / PACKET_BITS
                lane.sent += packets
                lane.again += packets * (dropped + self.loss)

    def _sample(self, lane: Lane) -> Sample:
        whole = (round(lane.acked), round(lane.sent), round(lane.again))
        return Sample(self.now_s, RTT_S + self.queue_s, RTT_S, *whole, 2, 1000)


@pytest.mark.parametrize("bits_per_s", [1e6, 1e7])
@pytest.mark.parametrize("buffer_s", [0.1, 1.0])
@pytest.mark.parametrize("lanes", [1, 4])
def test_the_line_is_used_and_its_queue_stays_short(
    bits_per_s: float, buffer_s: float, lanes: int
) -> None:
    way = Bottleneck(bits_per_s, buffer_s)
    for _ in range(lanes):
        way.add()
    way.run(30)  # whatever happens first
    way.run(30)
    assert way.carried > 0.9 * bits_per_s * 30
    assert way.most_s < 3 * QUEUE_S


def caps(way: Bottleneck) -> list[float]:
    return [lane.pace.cap_bps for lane in way.lanes]


def test_lanes_that_come_later_get_as_much() -> None:
    way = Bottleneck(1e7, 1.0)
    way.add()
    way.run(20)
    for _ in range(3):
        way.add()
    way.run(40)
    assert all(lane.pace.long for lane in way.lanes)
    assert max(caps(way)) < 2 * min(caps(way))


def test_who_begins_takes_from_the_others_and_adds_nothing() -> None:
    way = Bottleneck(1e7, 1.0)
    way.add()
    way.run(20)
    newcomer = way.add()
    newcomer.pace.look(way._sample(newcomer))
    assert sum(caps(way)) < 1.3e7
    assert newcomer.pace.cap_bps > 4 * way.lanes[0].pace.cap_bps


def test_who_has_sent_for_long_leaves_the_line_to_rounds_and_takes_what_they_leave() -> None:
    way = Bottleneck(1e7, 1.0)
    state = way.add()
    way.run(20)
    of_state = state.acked
    for _ in range(5):
        lane = way.add()
        way.run(1.6)
        assert lane.acked * 8 > 0.5 * 1.6e7
        way.lanes.remove(lane)
        way.now_s += TICK_S
    of_state, before = state.acked - of_state, state.acked
    assert of_state * 8 < 0.4 * 5 * 1.6e7
    way.run(10)
    assert (state.acked - before) * 8 > 0.7 * 1e8


def test_a_start_that_fills_the_queue_for_a_moment_makes_no_line_thin() -> None:
    line = Line()
    pace = line.pace("h")
    for look, (kb, queue_s) in enumerate([(0, 0.0), (60, 0.15), (200, 0.12), (400, 0.0)]):
        pace.look(Sample(look * TICK_S, RTT_S + queue_s, RTT_S, 1000 * kb, kb, 0, 2, 1000))
    assert math.isinf(pace.cap_bps)


@pytest.mark.parametrize("bits_per_s", [2 * THIN_BPS, 1e9])
@pytest.mark.parametrize("loss", [0.0, 0.03])
def test_a_wide_line_is_left_to_tcp(bits_per_s: float, loss: float) -> None:
    way = Bottleneck(bits_per_s, 1.0, loss)
    lanes = [way.add() for _ in range(4)]
    way.run(30)
    assert all(math.isinf(lane.pace.cap_bps) for lane in lanes)


def test_loss_with_empty_queues_slows_nothing_down() -> None:
    line = Line()
    pace, acked = line.pace("h"), 0
    for look in range(200):
        acked += 20_000
        packets = 15 * look
        pace.look(Sample(look * TICK_S, RTT_S, RTT_S, acked, packets, packets // 20, 2, 1000))
    assert math.isinf(pace.cap_bps)


def test_a_line_that_carries_more_than_it_did_is_thin_no_more() -> None:
    way = Bottleneck(1e7, 0.5)
    lane = way.add()
    way.run(20)
    assert lane.pace.cap_bps < THIN_BPS
    assert lane.pace.thin
    way.rate = 1e9
    way.run(40)
    assert math.isinf(lane.pace.cap_bps)
    assert not lane.pace.thin


def test_a_first_lane_is_left_alone_and_a_later_one_begins_with_what_the_line_carried() -> None:
    way = Bottleneck(1e7, 1.0)
    first = way.add()
    assert math.isinf(first.pace.look(way._sample(first)))
    way.run(20)
    way.now_s += 2 * PAUSE_S
    way.queue_s = 0.0
    later = way.add()
    assert 0.7 * 1e7 < later.pace.look(way._sample(later)) < 2 * 1e7


def test_what_the_line_carried_is_forgotten_in_the_end() -> None:
    way = Bottleneck(1e7, 1.0)
    way.add()
    way.run(20)
    way.now_s += 3 * LINE_S
    later = way.add()
    assert math.isinf(later.pace.look(way._sample(later)))


def test_others_may_fill_the_queue_for_ever_and_a_trickle_remains() -> None:
    way = Bottleneck(1e7, 1.0)
    lane = way.add()
    way.run(20)
    way.queue_s = 1.0
    for _ in range(500):
        way.now_s += TICK_S
        lane.pace.look(way._sample(lane))
        way.queue_s = min(2.0, way.queue_s * 1.001)
    assert FLOOR_BPS <= lane.pace.cap_bps < 1e6


def test_a_longer_way_is_no_queue_for_ever() -> None:
    """Routes change: the shortest round trip of long ago is forgotten."""
    line = Line()
    assert line.base_s("h", 0.02, 0.0) == 0.02
    assert line.base_s("h", 0.20, 10.0) == 0.02
    for now_s in range(20, 1300, 10):
        last = line.base_s("h", 0.20, float(now_s))
    assert last == 0.20


def test_a_connection_tells_and_is_held_back() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as door,
        socket.create_connection(door.getsockname()) as near,
        door.accept()[0] as far,
    ):
        near.sendall(bytes(1000))
        assert len(far.recv(1000, socket.MSG_WAITALL)) == 1000
        sample = Sample.of(near, 1.0)
        assert sample is not None
        assert 0 < sample.least_rtt_s <= sample.rtt_s < 5
        assert sample.sent >= 1
        assert sample.waiting == 0
        limit(near, 8e6)
        assert near.getsockopt(socket.SOL_SOCKET, 47) == 1_000_000
        limit(near, math.inf)
