"""One way to train one small language model with 16 peers at 4 sites, from first weights to loss.

A `Trial` says everything that the result depends on, so that results can be kept by it; `Course` is
what all trials of a seed share: the text, cut into everybody's batches, and the first weights. All
ways see the same batches in the same order, so equal steps are equal tokens.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean
from typing import Final, cast

import numpy as np
import torch

from peer.manifest import InnerSpec, OuterSpec
from peer.train.data import Blocks, TextFiles, stdlib_files
from peer.train.inner import Inner
from peer.train.models import seeded_model
from peer.train.pretrain import PretrainMethod
from peer.train.tokens import ByteTokenizer
from tensorcodecs import get_codec
from tests.bench.mixing import Crossing, Gossip, Group, apart
from tests.bench.stacked import Seat, Stack

PEERS: Final = 16
SITES: Final = 4

_BLOCK_SAMPLES: Final = 8
_WARMUP_STEPS: Final = 20
_LOSS_SHARE: Final = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How the peers work together."""

    title: str
    groups: int = SITES
    codec: str = "q4"
    lossy: bool = False
    """A tenth of the contributions never arrives."""


WAYS: Final = {
    "ddp": Way(title="synchronous DDP", groups=0),
    "flat": Way(title="flat DiLoCo, fp32", groups=1, codec="fp32"),
    "gossip": Way(title="groups + gossip, q4"),
    "lossy": Way(title="the same, 10 % of contributions lost", lossy=True),
    "none": Way(title="groups, q4, no gossip"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How large the model is, and how long it is trained."""

    hidden: int = 64
    intermediate: int = 232
    layers: int = 2
    tokens: int = 64
    batch: int = 2
    """Samples in an inner step of one peer."""
    steps: int = 800
    look_every: int = 100
    """Steps between two looks at the loss."""
    look_samples: int = 128
    last_samples: int = 512
    cooldown: float = 0.25
    """Share of the steps over which the learning rate falls to zero at the end."""

    def rate_at(self, step: int) -> float:
        """Share of the learning rate in step 1..`steps`, as `InnerSpec.rate_at` by the calendar."""
        left = self.steps - step + 1
        return min(1.0, left / (self.cooldown * self.steps)) if self.cooldown else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One training."""

    way: str
    """A key of `WAYS`."""
    seed: int
    inner_lr: float
    h: int = 0
    """Inner steps in a round; 0 with DDP, which has none."""
    outer_lr: float = 0.0
    momentum: float = 0.0
    gossip_every: int = 0
    """Rounds between two mixes; 0 where groups do not mix."""
    shards: str = "iid"
    """"iid": every peer's samples come from everywhere; "sites": each site has its own files."""
    size: Size = field(default_factory=Size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How it went."""

    curve: Sequence[tuple[int, float]]
    """(step, validation loss on `look_samples`), the mean over groups."""
    losses: Sequence[float]
    """The last validation loss of every group's own model, on `last_samples`."""
    mean_loss: float
    """The same of the mean of all groups' parameters."""
    apart: float
    """See `mixing.apart`."""
    gossip_bytes: int
    mean_bytes: int
    """Of one coded mean of all parameters."""
    averages: int
    """How often all peers of a group averaged one vector."""
    parameters: int
    seconds: float

    @property
    def loss(self) -> float:
        """The mean over the groups."""
        return fmean(self.losses)


class Course:
    """Text and first weights of a seed."""

    def __init__(self, seed: int, shards: str, size: Size) -> None:
        """
        Raises:
            DataError: this Python carries no sources to learn from.
        """
        self.config = {
            "model_type": "llama", "vocab_size": 264, "hidden_size": size.hidden,
            "intermediate_size": size.intermediate, "num_hidden_layers": size.layers,
            "num_attention_heads": 4, "max_position_embeddings": size.tokens,
            "tie_word_embeddings": True,
        }  # fmt: skip
        whole = Inner(seeded_model(self.config, seed), InnerSpec(), torch.device("cpu"))
        self.layout, self.first_N = whole.layout, whole.to_numpy()
        train, held_out = stdlib_files()
        if shards == "sites":
            train = sorted(train)  # so that neighbours are about the same things
        blocks = Blocks(
            TextFiles(train, check=False), ByteTokenizer(), sequence_length=size.tokens,
            block_samples=_BLOCK_SAMPLES, validation_share=0.0,
            validation_samples=size.last_samples,
            held_out=TextFiles(held_out, check=False), where="stdlib",
        )  # fmt: skip
        self.batches_SPBT = torch.stack(
            [
                _samples(blocks, share, size.steps * size.batch).view(
                    size.steps, size.batch, size.tokens
                )
                for share in _shares(blocks.blocks, seed, shards)
            ],
            dim=1,
        )
        self.validation_BT = torch.stack(blocks.validation())


def _shares(blocks: int, seed: int, shards: str) -> Iterator[list[int]]:
    """Each peer's blocks in its order; disjoint. Peers of one site are neighbours."""
    rng = random.Random(seed)
    order = list(range(blocks))
    if shards == "iid":
        rng.shuffle(order)
        yield from (order[peer::PEERS] for peer in range(PEERS))
        return
    for site in range(SITES):
        own = order[site * blocks // SITES : (site + 1) * blocks // SITES]
        rng.shuffle(own)
        yield from (own[peer :: PEERS // SITES] for peer in range(PEERS // SITES))


def _samples(blocks: Blocks, share: Sequence[int], count: int) -> torch.Tensor:
    samples = (sample for number in share for sample in blocks.block(number, 0))
    return torch.stack(list(itertools.islice(samples, count)))


@cache
def _course(seed: int, shards: str, size: Size) -> Course:
    return Course(seed, shards, size)


def train(trial: Trial) -> Outcome:
    """The whole training, on one thread."""
    course = _course(trial.seed, trial.shards, trial.size)
    run = _synchronous if trial.way == "ddp" else _in_rounds
    return run(trial, course, time.monotonic())


def _synchronous(trial: Trial, course: Course, started_s: float) -> Outcome:
    """DDP: one gradient, the mean of all peers'. That is the gradient of one large batch."""
    size = trial.size
    stack = _stack(trial, course, 1)
    curve = []
    for step, batch_PBT in enumerate(course.batches_SPBT, 1):
        stack.rate = size.rate_at(step)
        stack.step(batch_PBT.flatten(0, 1).unsqueeze(0))
        if step % size.look_every == 0:
            look = stack.evaluate(_some(course.validation_BT, size.look_samples))
            curve.append((step, float(look[0])))
    return Outcome(
        curve=curve,
        losses=(last := stack.evaluate(course.validation_BT).tolist()),
        mean_loss=last[0],
        apart=0.0,
        gossip_bytes=0,
        mean_bytes=4 * course.layout.numel,
        averages=size.steps,
        parameters=course.layout.numel,
        seconds=time.monotonic() - started_s,
    )


def _in_rounds(trial: Trial, course: Course, started_s: float) -> Outcome:
    size, way = trial.size, WAYS[trial.way]
    codec = get_codec(way.codec)
    stack = _stack(trial, course, PEERS)
    outer = OuterSpec(lr=trial.outer_lr, momentum=trial.momentum)
    methods = [
        PretrainMethod(cast("Inner", Seat(stack, peer)), outer, codec, mixing=way.groups > 1)
        for peer in range(PEERS)
    ]
    near = PEERS // way.groups
    groups = [Group(methods[first : first + near]) for first in range(0, PEERS, near)]
    gossip = Gossip(groups, random.Random(f"pairs/{trial.seed}"), every=trial.gossip_every)
    dice = random.Random(f"lost/{trial.seed}")
    looking = _stack(trial, course, way.groups)
    rounds = size.steps // trial.h
    curve = []
    mean_bytes = 0
    for round_ in range(1, rounds + 1):
        before = (round_ - 1) * trial.h
        for step, batch_PBT in enumerate(course.batches_SPBT[before : before + trial.h], 1):
            stack.rate = size.rate_at(before + step)
            stack.step(batch_PBT)
            for method, batch_BT in zip(methods, batch_PBT, strict=True):
                method.step(batch_BT)
        for group in groups:
            members = range(len(group.members))
            lost = frozenset(m for m in members if way.lossy and dice.random() < _LOSS_SHARE)
            mean_bytes = group.average(lost) or mean_bytes
        if trial.gossip_every:
            gossip.after(round_, rounds)
        if round_ * trial.h % size.look_every == 0 or round_ == rounds:
            look = _look(looking, groups, _some(course.validation_BT, size.look_samples))
            curve.append((round_ * trial.h, fmean(look)))
    return Outcome(
        curve=curve,
        losses=_look(looking, groups, course.validation_BT),
        mean_loss=_mean_look(looking, groups, course.validation_BT),
        apart=apart(groups),
        gossip_bytes=gossip.bytes,
        mean_bytes=mean_bytes,
        averages=rounds,
        parameters=course.layout.numel,
        seconds=time.monotonic() - started_s,
    )


def crossed(trial: Trial, outcome: Outcome) -> int:
    """Bytes between sites, with the cheapest way to average: see `mixing.Crossing.ring`."""
    if WAYS[trial.way].groups == SITES:
        return outcome.gossip_bytes
    return Crossing(PEERS, SITES).ring * outcome.mean_bytes * outcome.averages


def _stack(trial: Trial, course: Course, peers: int) -> Stack:
    spec = InnerSpec(lr=trial.inner_lr, warmup_steps=_WARMUP_STEPS, batch_size=trial.size.batch)
    return Stack(course.config, course.layout, course.first_N, spec, peers)


def _some(validation_BT: torch.Tensor, count: int) -> torch.Tensor:
    """About as many, spread evenly."""
    return validation_BT[:: max(1, len(validation_BT) // count)]


def _look(stack: Stack, groups: Sequence[Group], validation_BT: torch.Tensor) -> list[float]:
    """The loss of every group's outer parameters."""
    for number, group in enumerate(groups):
        stack.put(number, group.state()["theta"])
    found: list[float] = np.asarray(stack.evaluate(validation_BT), np.float64).tolist()
    return found


def _mean_look(stack: Stack, groups: Sequence[Group], validation_BT: torch.Tensor) -> float:
    """The loss of the mean of all groups' outer parameters."""
    thetas = [group.state()["theta"] for group in groups]
    stack.put(0, np.mean(thetas, axis=0, dtype=np.float32))
    return float(stack.evaluate(validation_BT)[0])
