"""The upload budget keeps its rate, lets control pass, and says what is not a rate."""

from __future__ import annotations

import asyncio

import pytest

from peer.errors import UsageError
from peer.net.budget import BURST_S, UploadBudget, parse_rate
from protocols import limits


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [
        ("20mbit", 20e6),
        ("1.5gbit", 1.5e9),
        ("800 kbit", 8e5),
        ("1000000", 1e6),
        ("20M", 20e6),
        ("3mbit/s", 3e6),
    ],
)
def test_a_rate_is_written_as_people_write_it(text: str, bits_per_s: float) -> None:
    assert parse_rate(text) == bits_per_s


@pytest.mark.parametrize("text", ["", "fast", "20mb", "-1mbit", "0", "1kbit", "20mbit extra"])
def test_what_is_no_rate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="bit"):
        parse_rate(text)


def test_bulk_keeps_the_rate() -> None:
    clock = Clock()
    budget = UploadBudget(8e6, clock)  # 1 MB/s
    start_s = clock.now_s
    sent = 0
    while clock.now_s < start_s + 10:
        clock.now_s += budget.reserve(50_000)
        sent += 50_000
    assert sent == pytest.approx(10 * 1e6, rel=0.03)


def test_a_pause_saves_up_no_more_than_the_burst() -> None:
    clock = Clock()
    budget = UploadBudget(8e6, clock)
    clock.now_s += 3600
    free = 0
    while budget.reserve(10_000) == 0.0:
        free += 10_000
    assert free <= BURST_S * 1e6 + 10_000


def test_control_never_waits_and_bulk_pays_for_it() -> None:
    clock = Clock()
    budget = UploadBudget(8e6, clock)
    budget.charge(1_100_000)
    assert budget.reserve(1) == pytest.approx(1.0)


def test_without_a_rate_nothing_waits_but_everything_is_counted() -> None:
    budget = UploadBudget(None, Clock())
    assert budget.reserve(10**9) == 0.0
    budget.charge(5)
    budget.received(7)
    assert (budget.bytes_up, budget.bytes_down) == (5, 7)


def test_slow_lines_send_small_pieces() -> None:
    assert UploadBudget(None).piece_bytes == limits.FRAME_BYTES_MAX
    assert UploadBudget(1e9).piece_bytes == limits.FRAME_BYTES_MAX
    slow = UploadBudget(1e6)
    # Every one of the streams that a stranger may open moves well within the deadline.
    round_s = limits.STREAMS_PER_PEER_MAX * slow.piece_bytes / (1e6 / 8)
    assert round_s < limits.PROGRESS_TIMEOUT_S / 2


async def test_what_is_cancelled_is_not_paid() -> None:
    clock = Clock()
    budget = UploadBudget(8e6, clock)
    budget.charge(1_100_000)
    waiting = asyncio.create_task(budget.take(5_000_000))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert budget.reserve(1) == pytest.approx(1.0)
    assert budget.bytes_up == 1_100_000
