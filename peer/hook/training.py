"""A training thread that makes no steps: it is told of those that a script makes.

All else is `Trainer`'s: requests are served between two of the steps told, statistics are those of
the script's steps, and a contribution holds the values of one moment with exactly the tokens that
were learned by then.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final, cast

import torch

from peer.hook.values import ScriptValues
from peer.train.flat import FlatMethod
from peer.train.method import DataSource, Method
from peer.train.trainer import Batches, Harvest, Trainer

FROZEN_KEPT: Final = 256  # rounds of which it is known how much was in them

_NO_BATCH: Final = torch.zeros(0, 0, dtype=torch.int64)


class NoBlocks(DataSource):
    """The script's data is its own: nobody else is told of it."""

    blocks = 0

    def block(self, index: int, epoch: int) -> list[torch.Tensor]:
        raise IndexError("there are no blocks")

    def validation(self) -> list[torch.Tensor]:
        return []


class ScriptTrainer(Trainer):
    """See the module. `ready` is set as soon as there is a state to train on."""

    def __init__(
        self, build: Callable[[], tuple[Method, Batches]], *, threads: int | None = None
    ) -> None:
        super().__init__(build, threads=threads)
        self.ready = threading.Event()
        self.told = 0
        """Tokens of all steps that are behind contributions."""
        self.frozen: deque[tuple[int, int]] = deque(maxlen=FROZEN_KEPT)
        """(round, `told` when its contribution was frozen)."""

    @property
    def values(self) -> ScriptValues:
        return cast("ScriptValues", cast("FlatMethod", self.method).inner)

    def start(self) -> None:
        super().start()
        self.values.on_finished = self._ring
        self.ready.set()

    def start_over(self) -> None:
        """Drop local work: the script's parameters become what the run has. Also for whoever ended
        this thread."""
        self.method.load_state(self.method.state())

    def _ring(self) -> None:
        with self._wake:
            self._wake.notify()

    def _nothing_to_do(self) -> bool:
        return not (self._closing or self._requests or self.values.waiting)

    def _waited_s(self) -> float:
        return 0.0  # waiting for the script is not waiting for the network, which it never does

    def _train(self) -> None:
        result = self.method.step(_NO_BATCH)
        self.told += result.tokens
        self._account(trained_s=self.values.step_s, tokens=result.tokens, loss=result.loss, steps=1)

    def _freeze(self, method: Method, number: int) -> Harvest:
        with self.values.still() as made:
            while made:
                self._train()
            self.frozen.append((number, self.told))
            return super()._freeze(method, number)
