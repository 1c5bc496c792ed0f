"""Workers that learn one small language model together, in turns, in this process: the real thing
without a network, so that codecs can be compared on nothing but what they lose.

Rounds are DiLoCo's (arXiv 2311.08105) with the default run's outer step: everybody makes `steps`
inner AdamW steps on data of his own, sends theta - x, and applies the mean that comes back. What
"sends" and "comes back" mean is the caller's: a `Carry` says what arrives of what is sent.

Shapes: N = parameters, B = samples, T = tokens in a sample.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from peer.manifest import InnerSpec, default_manifest
from peer.train.data import Blocks, TextFiles, stdlib_files
from peer.train.inner import Inner
from peer.train.models import seeded_model
from peer.train.tokens import ByteTokenizer
from tensorcodecs import Layout

Float32 = npt.NDArray[np.float32]

Carry = Callable[[Float32], Float32]
"""What arrives of a vector (N,) that is sent. May remember things between rounds."""

_VOCABULARY: Final = 264  # the bytes and their end mark, rounded up to a multiple of 8
_BLOCK_SAMPLES: Final = 8
_EVALUATED: Final = 64  # samples at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is learned, by whom, on what."""

    hidden: int = 96
    layers: int = 3
    workers: int = 4
    warmup_steps: int = 100
    """Made once, by one worker, before all others start from there."""
    rounds: int = 10
    steps: int = 20
    """Inner steps of each worker in a round."""
    batch: int = 4
    tokens: int = 64
    lr: float = 3e-3
    validation_samples: int = 512


class Swarm:
    """Everything that the arms of a comparison share: first weights, data, its order, a warm-up.

    `learn` may be called again and again, and always starts from the same state.
    """

    def __init__(self, seed: int, plan: Plan) -> None:
        """Builds the model and warms it up.

        Raises:
            DataError: this Python carries no sources to learn from.
        """
        self._plan = plan
        self._outer = default_manifest().outer
        config = {
            "model_type": "llama", "vocab_size": _VOCABULARY, "hidden_size": plan.hidden,
            "intermediate_size": plan.hidden * 8 // 3, "num_hidden_layers": plan.layers,
            "num_attention_heads": 4, "max_position_embeddings": plan.tokens,
            "tie_word_embeddings": True,
        }  # fmt: skip
        spec = InnerSpec(lr=plan.lr, warmup_steps=20, batch_size=plan.batch)
        self._inner = Inner(seeded_model(config, seed), spec, torch.device("cpu"))
        train, held_out = stdlib_files()
        self._data = Blocks(
            TextFiles(train, check=False), ByteTokenizer(), sequence_length=plan.tokens,
            block_samples=_BLOCK_SAMPLES, validation_share=0.0,
            validation_samples=plan.validation_samples,
            held_out=TextFiles(held_out, check=False), where="stdlib",
        )  # fmt: skip
        order = list(range(self._data.blocks))
        random.Random(seed).shuffle(order)
        # Disjoint: one share for each worker, one for the warm-up.
        shares = [order[first :: plan.workers + 1] for first in range(plan.workers + 1)]
        warmup = self._batches(shares[0])
        self._batches_of = [
            list(itertools.islice(self._batches(share), plan.rounds * plan.steps))
            for share in shares[1:]
        ]
        for batch_BT in itertools.islice(warmup, plan.warmup_steps):
            self._inner.step(batch_BT)
        self._first_N = self._inner.to_numpy()
        self._first_state = self._inner.state()

    @property
    def layout(self) -> Layout:
        """Which tensor lies where in a vector (N,)."""
        return self._inner.layout

    @property
    def outer(self) -> str:
        """The outer step's settings, in words."""
        return f"Nesterov {self._outer.lr:g} / {self._outer.momentum:g}"

    @cached_property
    def first_loss(self) -> float:
        """The validation loss after the warm-up."""
        return self._loss(self._first_N)

    def learn(self, up: Sequence[Carry], down: Carry) -> float:
        """The validation loss after all rounds: worker i's pseudo-gradient goes through `up[i]`,
        the mean of what arrives through `down`. As many workers take part as `up` has entries.
        """
        theta_N = self._first_N.copy()
        momentum_N = np.zeros_like(theta_N)
        states: list[dict[str, npt.NDArray[Any]]] = [self._first_state] * len(up)
        lr, beta = np.float32(self._outer.lr), np.float32(self._outer.momentum)
        for round_ in range(self._plan.rounds):
            sum_N = np.zeros_like(theta_N)
            for worker, carry in enumerate(up):
                self._inner.load(theta_N)
                self._inner.load_state(states[worker])
                first = round_ * self._plan.steps
                for batch_BT in self._batches_of[worker][first : first + self._plan.steps]:
                    self._inner.step(batch_BT)
                states[worker] = self._inner.state()
                sum_N += carry(theta_N - self._inner.to_numpy())
            mean_N = down((sum_N / len(up)).astype(np.float32))
            momentum_N *= beta
            momentum_N += mean_N
            theta_N -= lr * (mean_N + beta * momentum_N)
        return self._loss(theta_N)

    def _batches(self, blocks: Sequence[int]) -> Iterator[torch.Tensor]:
        """(B, T) each, from one worker's blocks in their order."""
        samples = (sample for number in blocks for sample in self._data.block(number, 0))
        while batch := list(itertools.islice(samples, self._plan.batch)):
            yield torch.stack(batch)

    def _loss(self, theta: Float32) -> float:
        samples = self._data.validation()
        return self._inner.evaluate(
            theta,
            (
                torch.stack(samples[first : first + _EVALUATED])
                for first in range(0, len(samples), _EVALUATED)
            ),
        )
