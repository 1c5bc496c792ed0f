"""One thread that trains, and the event loop's handle on it.

The method, the model and the stream of batches are touched only in that thread. The event loop
asks with `run(fn)`: the thread calls `fn(method)` between two inner steps and the answer comes
back as an awaitable, so the loop never waits for torch.

Time is accounted three ways: steps (`trained_s`), requests (`served_s`), and standing still after
the first `start` (`waited_s`): paused by the driver, or the method has nothing to do before an
outcome comes, which both mean waiting for the network.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

from peer.train.method import Contribution, Method
from protocols.blocks import NO_BLOCKS, BlockReport

REQUESTS_MAX = 64  # waiting for the thread; the driver has a handful

P = ParamSpec("P")
T = TypeVar("T")


class Batches(Protocol):
    """Where batches come from: `peer.train.shared.SharedStream` from the run's data,
    `peer.train.stream.BlockStream` from a peer's own."""

    def next_batch(self) -> torch.Tensor:
        """(B, T) int64."""

    def drain_used(self) -> list[tuple[int, int]]:
        """(epoch, block) pairs used since the last call."""

    def report(self, number: int) -> BlockReport:
        """What the others are told of the blocks behind round `number`'s contribution, frozen
        now."""

    def drop(self) -> None:
        """The local work since the last contribution that was inside is gone."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What the thread did in a stretch of time."""

    steps: int = 0
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite; they changed nothing."""
    tokens: int = 0
    loss: float = math.nan
    """Mean over the steps, nats per token; NaN without any."""
    trained_s: float = 0.0
    served_s: float = 0.0
    waited_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """While training, not counting requests and waits."""
        return self.tokens / self.trained_s if self.trained_s else 0.0


@dataclass(frozen=True, slots=True)
class Harvest:
    """A contribution with what is known about the work in it."""

    contribution: Contribution
    blocks: list[tuple[int, int]]
    stats: Stats
    """Since the harvest before."""
    report: BlockReport = NO_BLOCKS


class Training(Protocol):
    """What makes a `Trainer` of a builder."""

    def __call__(
        self, build: Callable[[], tuple[Method, Batches]], *, threads: int | None
    ) -> Trainer: ...


class Trainer:
    """Owns the training thread. `open` once, `start` and `pause` as often as needed, `aclose`.

    A failed step ends training: `failed` gets the exception, `run` raises it from then on.
    """

    def __init__(
        self,
        build: Callable[[], tuple[Method, Batches]],
        *,
        threads: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`build` runs in the thread (importing the model library takes seconds). `threads`: the
        most CPU cores torch may use; None leaves it to torch."""
        self._build = build
        self._threads = threads
        self._clock = clock
        self._wake = threading.Condition()
        self._running = False
        self._closing = False
        self._requests: deque[tuple[Future[Any], Callable[[Method], Any]]] = deque()
        self._thread = threading.Thread(target=self._main, name="trainer", daemon=True)
        self._method: Method | None = None
        self._batches: Batches | None = None
        self._built: Future[None] = Future()
        self._failed: Future[None] = Future()
        self._stats = Stats()
        self._loss_sum = 0.0
        self._started = False
        self._idle_since: float | None = None  # while the thread stands still

    async def open(self) -> None:
        """Start the thread and build the method in it; training waits for `start`.

        Raises:
            PeerError: what `build` raised.
        """
        self._thread.start()
        await asyncio.wrap_future(self._built)

    def start(self) -> None:
        """Go on training."""
        with self._wake:
            if not self._started:
                self._started = True
                self._idle_since = None  # what came before the first start was no waiting
            self._running = True
            self._wake.notify()

    def pause(self) -> None:
        """Stand still after the current step; requests are still served."""
        with self._wake:
            self._running = False

    @property
    def method(self) -> Method:
        """For reading what never changes (`units`); everything else goes through `run`."""
        assert self._method is not None, "open() first"
        return self._method

    @property
    def batches(self) -> Batches:
        """To be touched inside `run` only."""
        assert self._batches is not None, "open() first"
        return self._batches

    @property
    def failed(self) -> asyncio.Future[None]:
        """Done with an exception when training broke down; cancelled at an orderly end."""
        return asyncio.wrap_future(self._failed)

    async def run(
        self, fn: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`fn(method, *args)` in the training thread, between two steps.

        Raises whatever `fn` raises. A cancelled caller's request is dropped if not begun.
        """
        answer: Future[T] = Future()
        with self._wake:
            if self._failed.done() and not self._failed.cancelled():
                self._failed.result()
            if self._closing:
                raise RuntimeError("the trainer is closed")
            if len(self._requests) >= REQUESTS_MAX:
                raise RuntimeError("too many requests wait for the training thread")
            self._requests.append((answer, lambda method: fn(method, *args, **kwargs)))
            self._wake.notify()
        return await asyncio.wrap_future(answer)

    async def harvest(self, number: int) -> Harvest:
        """Freeze what round `number` takes of the work so far, with the blocks and statistics since
        the last harvest, in one piece."""

        return await self.run(self._freeze, number)

    def stats(self) -> Stats:
        """Since the last harvest, up to now."""
        with self._wake:
            return self._snapshot()

    async def aclose(self) -> None:
        """Finish the current step and end the thread. Requests that wait get a RuntimeError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            # Really join: torch aborts a process that exits while a thread still frees tensors.
            await asyncio.shield(asyncio.to_thread(self._thread.join))

    # ── in the thread ────────────────────────────────────────────────────────────────────

    def _freeze(self, method: Method, number: int) -> Harvest:
        contribution = method.contribution(method.fragments.of(number))
        used = self.batches.drain_used()
        # Half-done work of who has stopped for good won't be whole in a later round.
        half_done = not method.carries and not self._running
        if contribution.weight <= 0 and (half_done or not method.owes()):
            self.batches.drop()  # no step was sound, or the method threw it all away
        report = self.batches.report(number)
        return Harvest(contribution, used, self._take_stats(), report)

    def _main(self) -> None:
        try:
            if self._threads is not None:
                torch.set_num_threads(self._threads)
            self._method, self._batches = self._build()
            self._built.set_result(None)
            while self._turn():
                pass
            self._failed.cancel()
            self._end(RuntimeError("the trainer is closed"))
        except BaseException as error:  # handed over, never swallowed: the driver must see it
            (self._failed if self._built.done() else self._built).set_exception(error)
            self._end(error)

    def _end(self, reason: BaseException) -> None:
        with self._wake:
            self._closing = True
            waiting = [answer for answer, _ in self._requests]
            self._requests.clear()
        for answer in waiting:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(reason)

    def _turn(self) -> bool:
        """Serve one request, or take one step, or wait for either. False at the end."""
        with self._wake:
            if self._nothing_to_do():
                self._idle_since = self._clock() if self._started else None
                while self._nothing_to_do():
                    self._wake.wait()
                self._stats = replace(self._stats, waited_s=self._waited_s())
                self._idle_since = None
            if self._closing:
                return False
            request = self._requests.popleft() if self._requests else None
        if request is not None:
            self._serve(*request)
            return True
        self._train()
        return True

    def _train(self) -> None:
        """Take one step."""
        begun = self._clock()
        result = self.method.step(self.batches.next_batch())
        self._account(
            trained_s=self._clock() - begun, tokens=result.tokens, loss=result.loss, steps=1
        )

    def _nothing_to_do(self) -> bool:
        """Paused, or the method waits for an outcome; what ends that is a request."""
        training = self._running and not self.method.idle
        return not (self._closing or self._requests or training)

    def _serve(self, answer: Future[Any], call: Callable[[Method], Any]) -> None:
        if not answer.set_running_or_notify_cancel():
            return
        begun = self._clock()
        try:
            result = call(self.method)
        except BaseException as error:  # goes to whoever asked
            self._account(served_s=self._clock() - begun)
            answer.set_exception(error)
        else:
            self._account(served_s=self._clock() - begun)  # first: whoever asked may look
            answer.set_result(result)

    def _account(
        self,
        *,
        trained_s: float = 0.0,
        served_s: float = 0.0,
        tokens: int = 0,
        loss: float = 0.0,
        steps: int = 0,
    ) -> None:
        with self._wake:
            old = self._stats
            good = steps if tokens else 0
            self._loss_sum += loss if good else 0.0
            self._stats = replace(
                old,
                steps=old.steps + good,
                skipped_steps=old.skipped_steps + steps - good,
                tokens=old.tokens + tokens,
                trained_s=old.trained_s + trained_s,
                served_s=old.served_s + served_s,
            )

    def _waited_s(self) -> float:
        still = self._clock() - self._idle_since if self._idle_since is not None else 0.0
        return self._stats.waited_s + still

    def _snapshot(self) -> Stats:
        old = self._stats
        loss = self._loss_sum / old.steps if old.steps else math.nan
        return replace(old, loss=loss, waited_s=self._waited_s())

    def _take_stats(self) -> Stats:
        with self._wake:
            taken = self._snapshot()
            self._stats, self._loss_sum = Stats(), 0.0
            return taken
