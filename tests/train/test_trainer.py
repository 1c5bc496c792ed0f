"""One thread trains; the event loop asks between steps and never waits for torch."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peer.errors import DataError
from peer.train.method import StepResult
from peer.train.trainer import Trainer
from protocols.blocks import NO_BLOCKS, BlockReport
from protocols.fragments import Fragments


class Toy:
    """Counts its steps; each takes until `gate` is open."""

    units = 1
    idle = False
    carries = True
    weight = 1.0
    owed = False

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.stepped = threading.Event()
        self.steps = 0
        self.fail: Exception | None = None
        self.thread = threading.current_thread()

    def step(self, batch: torch.Tensor) -> StepResult:
        assert threading.current_thread() is self.thread
        self.entered.set()
        self.gate.wait()
        if self.fail is not None:
            raise self.fail
        self.steps += 1
        self.stepped.set()
        if self.steps % 2:
            return StepResult(loss=float(self.steps), tokens=10)
        return StepResult(loss=float("nan"), tokens=0)

    fragments = Fragments((0, 1))

    def owes(self) -> bool:
        return self.owed

    def contribution(self, units: range) -> Any:
        return SimpleNamespace(weight=self.weight, steps=self.steps)


class Batches:
    def next_batch(self) -> torch.Tensor:
        return torch.zeros(1, 2, dtype=torch.int64)

    def drain_used(self) -> list[tuple[int, int]]:
        return [(0, 1)]

    def report(self, number: int) -> BlockReport:
        return NO_BLOCKS

    def drop(self) -> None:
        raise AssertionError("there was work")


def _trainer(toy: list[Toy]) -> Trainer:
    def build() -> tuple[Any, Batches]:
        toy.append(Toy())
        return toy[0], Batches()

    return Trainer(build, threads=1)


async def _until_stepped(toy: Toy) -> None:
    toy.stepped.clear()
    await asyncio.to_thread(toy.stepped.wait, 10)


async def test_it_is_built_in_its_thread_and_trains_only_when_told() -> None:
    toys: list[Toy] = []
    trainer = _trainer(toys)
    await trainer.open()
    toy = toys[0]
    assert toy.thread is not threading.main_thread()
    assert await trainer.run(lambda method: method.steps) == 0
    trainer.start()
    await _until_stepped(toy)
    trainer.pause()
    steps = await trainer.run(lambda method: method.steps)
    assert await trainer.run(lambda method: method.steps) == steps
    await trainer.aclose()
    assert not toy.thread.is_alive()


async def test_a_method_that_waits_for_an_outcome_is_asked_for_no_steps() -> None:
    toys: list[Toy] = []
    trainer = _trainer(toys)
    await trainer.open()

    def wait(method: Any, yes: bool) -> int:
        method.idle = yes
        return int(method.steps)

    trainer.start()
    await _until_stepped(toys[0])
    steps = await trainer.run(wait, True)
    await asyncio.to_thread(_until_idle, trainer)
    assert await trainer.run(wait, True) == steps
    await trainer.run(wait, False)
    await _until_stepped(toys[0])
    assert toys[0].steps > steps
    await trainer.aclose()


@pytest.mark.parametrize(("carries", "running", "dropped"), [
    (True, True, 0), (True, False, 0), (False, True, 0), (False, False, 1),
])  # fmt: skip
async def test_half_done_work_is_given_up_by_who_stops_for_good_and_cant_carry_it_over(
    carries: bool, running: bool, dropped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or who leaves would wait in vain for its last blocks to get inside."""
    drops: list[int] = []
    monkeypatch.setattr(Batches, "drop", lambda _: drops.append(1))
    toys: list[Toy] = []
    trainer = _trainer(toys)
    await trainer.open()
    toys[0].weight, toys[0].owed, toys[0].carries = 0.0, True, carries
    trainer.start()
    await _until_stepped(toys[0])
    if not running:
        trainer.pause()
    await trainer.harvest(0)
    assert len(drops) == dropped
    await trainer.aclose()


async def test_the_loop_runs_on_while_a_step_takes_long() -> None:
    toys: list[Toy] = []
    trainer = _trainer(toys)
    await trainer.open()
    toys[0].gate.clear()
    trainer.start()
    await asyncio.to_thread(toys[0].entered.wait, 10)
    answer = asyncio.ensure_future(trainer.run(lambda method, add: method.steps + add, 100))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not answer.done()
    toys[0].gate.set()
    assert await answer >= 100
    await trainer.aclose()


async def test_a_harvest_tells_of_the_steps_since_the_one_before() -> None:
    toys: list[Toy] = []
    trainer = _trainer(toys)
    await trainer.open()
    trainer.start()
    await _until_stepped(toys[0])
    await _until_stepped(toys[0])
    trainer.pause()
    first = await trainer.harvest(0)
    total: Any = first.contribution.steps  # type: ignore[attr-defined]
    assert first.blocks == [(0, 1)]
    assert first.stats.steps + first.stats.skipped_steps == total
    assert first.stats.tokens == 10 * first.stats.steps
    odd = range(1, total + 1, 2)
    assert first.stats.loss == pytest.approx(sum(odd) / len(odd))
    assert first.stats.tokens_per_s > 0
    again = await trainer.harvest(0)
    assert (again.stats.steps, again.stats.tokens) == (0, 0)
    await trainer.aclose()


async def test_standing_still_is_counted_apart_from_work_and_requests() -> None:
    now = [0.0]
    toys: list[Toy] = []
    made = _trainer(toys)
    trainer = Trainer(made._build, clock=lambda: now[0])

    def busy(method: Any, seconds: float) -> None:
        now[0] += seconds

    await trainer.open()
    now[0] += 1000  # before the first start: no waiting
    await trainer.run(busy, 3.0)
    assert trainer.stats().waited_s == 0
    trainer.start()
    await _until_stepped(toys[0])
    trainer.pause()
    await trainer.run(busy, 0.0)
    waited = trainer.stats().waited_s
    assert waited == 0
    await asyncio.to_thread(_until_idle, trainer)
    now[0] += 5
    assert trainer.stats().waited_s == 5
    await trainer.run(busy, 7.0)
    stats = trainer.stats()
    assert (stats.waited_s, stats.served_s, stats.trained_s) == (5, 10, 0)
    await trainer.aclose()


def _until_idle(trainer: Trainer) -> None:
    deadline = time.monotonic() + 10
    while trainer._idle_since is None:  # without its lock, which the thread needs to come to rest
        assert time.monotonic() < deadline, "the thread never came to rest"
        time.sleep(0)


async def test_what_a_request_raises_goes_to_whoever_asked_and_training_goes_on() -> None:
    toys: list[Toy] = []
    trainer = _trainer(toys)
    await trainer.open()
    trainer.start()

    def wrong(method: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await trainer.run(wrong)
    await _until_stepped(toys[0])
    await trainer.aclose()


async def test_a_step_that_fails_is_told_and_never_silent() -> None:
    toys: list[Toy] = []
    trainer = _trainer(toys)
    await trainer.open()
    failed = trainer.failed
    toys[0].fail = DataError("the disk is gone")
    trainer.start()
    async with asyncio.timeout(10):
        with pytest.raises(DataError, match="disk"):
            await failed
    with pytest.raises(DataError, match="disk"):
        await trainer.run(lambda method: 0)
    await trainer.aclose()


async def test_a_build_that_fails_is_told_by_open() -> None:
    def build() -> Any:
        raise DataError("nothing to read")

    trainer = Trainer(build)
    with pytest.raises(DataError, match="nothing"):
        await trainer.open()
    await trainer.aclose()


async def test_closing_answers_requests_that_still_wait() -> None:
    toys: list[Toy] = []
    trainer = _trainer(toys)
    await trainer.open()
    toys[0].gate.clear()
    trainer.start()
    await asyncio.to_thread(toys[0].entered.wait, 10)
    answer = asyncio.ensure_future(trainer.run(lambda method: 0))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(trainer.aclose())
    await asyncio.sleep(0)
    toys[0].gate.set()
    await closing
    with pytest.raises(RuntimeError, match="closed"):
        await answer
    with pytest.raises(RuntimeError, match="closed"):
        await trainer.run(lambda method: 0)
