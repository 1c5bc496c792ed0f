"""Upload is measured on what is sent anyway, and told without flapping."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from peer.capacity import (
    APART,
    BURSTS_MIN,
    MEASURED_BYTES_MIN,
    UPLOAD_KBPS_UNKNOWN,
    Capacity,
    UploadMeter,
)
from peer.clock import Clock

MIB = 2**20


@dataclass
class ByHand(Clock):
    now_s: float = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s


def burst(meter: UploadMeter, clock: ByHand, line_bps: float, sizes: list[int]) -> None:
    """Equal shares of the line for all transfers that are under way."""
    transfers = [meter.sending() for _ in sizes]
    inside = [t.__enter__() for t in transfers]
    left = dict(enumerate(map(float, sizes)))
    while left:
        first = min(left, key=lambda i: left[i])
        clock.now_s += 8 * left[first] * len(left) / line_bps
        gone = left[first]
        left = {i: size - gone for i, size in left.items()}
        del left[first]
        inside[first].confirmed(sizes[first])
        transfers[first].__exit__(None, None, None)
    clock.now_s += 1.0


@pytest.mark.parametrize("line_bps", [2e6, 5e7, 1e9])
def test_transfers_that_share_the_line_are_measured_together(line_bps: float) -> None:
    clock = ByHand()
    meter = UploadMeter(clock)
    rng = random.Random(int(line_bps))
    for _ in range(6):
        burst(meter, clock, line_bps, [rng.randint(1, 4) * MIB for _ in range(rng.randint(1, 7))])
    assert meter.kbps == pytest.approx(line_bps / 1000, rel=0.01)


def test_a_slow_receiver_hides_no_fast_line() -> None:
    clock = ByHand()
    meter = UploadMeter(clock)
    for _ in range(BURSTS_MIN):
        with meter.sending() as slow:
            with meter.sending() as quick:
                clock.now_s += 0.1
                quick.confirmed(MIB)
            clock.now_s += 20.0
            slow.confirmed(MIB)
    assert meter.kbps == pytest.approx(8 * MIB / 0.1 / 1000, rel=0.01)


def test_what_never_arrives_and_what_is_small_is_no_measurement() -> None:
    clock = ByHand()
    meter = UploadMeter(clock)
    for _ in range(20):
        with meter.sending():
            clock.now_s += 1.0  # refused, or broken off
        with meter.sending() as small:
            clock.now_s += 0.001
            small.confirmed(MEASURED_BYTES_MIN - 1)
    assert meter.kbps is None


def test_one_figure_that_is_too_good_changes_nothing() -> None:
    clock = ByHand()
    meter = UploadMeter(clock)
    for _ in range(BURSTS_MIN):
        burst(meter, clock, 1e7, [MIB])
    burst(meter, clock, 1e11, [MIB])
    assert meter.kbps == pytest.approx(10_000, rel=0.01)


def test_what_is_told_keeps_still_while_measurements_waver() -> None:
    rng = random.Random(4)
    capacity = Capacity(None)
    told = [capacity.kbps(int(20_000 * rng.uniform(0.85, 1.2)), []) for _ in range(200)]
    assert len(set(told)) == 1
    assert capacity.kbps(4_000, []) == 4_000, "a line that changed is told"
    assert capacity.kbps(int(4_000 * APART) - 1, []) == 4_000


def test_a_budget_is_never_exceeded_and_an_unmeasured_line_passes_for_a_usual_one() -> None:
    assert Capacity(5e6).kbps(None, [900_000] * 3) == 5_000
    assert Capacity(5e6).kbps(80_000, []) == 5_000
    assert Capacity(5e6).kbps(2_000, []) == 2_000, "a line thinner than its owner thinks"
    assert Capacity(None).kbps(None, []) == UPLOAD_KBPS_UNKNOWN
    assert Capacity(None).kbps(None, [3_000, 8_000, 900_000]) == 8_000
    newcomer = Capacity(None)
    assert newcomer.kbps(None, [8_000]) == 8_000
    assert newcomer.kbps(50_000, [8_000]) == 50_000
