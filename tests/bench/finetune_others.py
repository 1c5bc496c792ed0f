"""Trainings that are no run's method: HetLoRA as a baseline, zeroth order, and anarchic steps.

Zeroth-order peers are the product's (`peer.train.zeroth`), with its records and its signatures.
Anarchic peers push what the product's `Anarchic` takes, but no run offers that yet, so what drives
it stands here: each worker pulls the newest values when it has pushed, and trains until its turn
comes again, so rare ones are many versions behind.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Final, Literal

import numpy as np
import torch

from peer.finetune import mezo
from peer.finetune.anarchic import Anarchic, Move, Pushed, Rule, make_push, mean_gradient
from peer.finetune.baselines import hetlora, truncated
from peer.finetune.changes import LowRank
from peer.finetune.decomfl import seeds_of
from peer.finetune.tensors import Weights
from peer.manifest_zeroth import ZerothSpec
from peer.train.adapted import Adapted, adapt
from peer.train.inner import Inner, next_token_loss
from peer.train.lora import with_adapters
from peer.train.models import generator_of
from peer.train.samples import learned_tokens
from peer.train.zeroth import RecordReducer, ZerothMethod
from peer.train.zeroth_rules import rules_of
from protocols.identity import Signer
from protocols.types import PeerId
from tests.bench.finetune_trial import (
    CPU,
    Course,
    Outcome,
    Trial,
    course_of,
    manifest_of,
    told,
)
from tests.bench.result import BenchError

TURNED: Final = 0.5
"""As `peer.train.lora`: factors that move by more than this share begin with fresh moments."""
ARRIVALS: Final = (7, 1, 1, 1)
WORKER_TASKS: Final = 2
LOCAL_STEPS_MAX: Final = 5
PER_STEP: Final = 2
"""m: arrivals behind each step of the common values."""
OUTER_STEPS: Final = 3.0
"""The common values move by so many local steps' length: as many as a worker makes, on average."""


# ── HetLoRA ──────────────────────────────────────────────────────────────────────────────
class HetPeer:
    """A client that holds the first `rank` ranks of the common factors, and trains those."""

    def __init__(self, trial: Trial, course: Course, rank: int) -> None:
        run = manifest_of(trial, course, "hybrid")
        model = course.model()
        self.layers = adapt(model, run.method.targets)
        self._rank, self._scale = rank, run.method.alpha / rank
        for adapted in self.layers.values():
            adapted.with_factors(rank, self._scale)
        self.inner = Inner(model, run.inner, CPU)

    def take(self, states: Sequence[LowRank]) -> None:
        """Begin at the common factors."""
        offsets = dict(zip(self.inner.layout.names, self.inner.layout.offsets, strict=True))
        for (name, adapted), state in zip(self.layers.items(), states, strict=True):
            given = truncated(state, self._rank, scale=self._scale)
            for letter, values in (("A", given.A), ("B", given.B)):
                own: torch.nn.Parameter = getattr(adapted, letter)
                new = torch.from_numpy(values.astype(np.float32))
                with torch.no_grad():
                    turned = float((new - own).norm()) > TURNED * float(own.norm())
                    own.copy_(new)
                start = offsets[f"{name}.{letter}"]
                if turned:
                    self.inner.forget(slice(start, start + own.numel()))

    def given(self) -> list[LowRank]:
        """What it sends: its factors."""
        return [_factors(adapted) for adapted in self.layers.values()]


def _factors(adapted: Adapted) -> LowRank:
    A, B = (values.detach().numpy().copy() for values in (adapted.A, adapted.B))
    return LowRank(A, B, adapted.scale)


def hetlora_rounds(trial: Trial, ranks: Sequence[int]) -> Outcome:
    """Eight peers of these ranks. Ranks are what machines can do, so nobody prunes its own."""
    started_s, course = time.monotonic(), course_of(trial.base, trial.size.tokens)
    streams = course.streams(trial)
    peers = [HetPeer(trial, course, rank) for rank in ranks]
    top = max(ranks)
    states = []
    for name, adapted in peers[0].layers.items():
        m, n = adapted.layer.shape
        bound = 1 / math.sqrt(n)
        A = generator_of(trial.seed, name).uniform(-bound, bound, (top, n))
        states.append(LowRank(A, np.zeros((m, top))))
    for _ in range(trial.size.rounds):
        for peer, stream in zip(peers, streams, strict=True):
            peer.take(states)
            for _ in range(trial.size.steps):
                peer.inner.step(stream.next_batch())
        by_layer = zip(*(peer.given() for peer in peers), strict=True)
        states = [hetlora([(1.0, part) for part in parts]) for parts in by_layer]
    judged = peers[0]
    for adapted, state in zip(judged.layers.values(), states, strict=True):
        adapted.state, adapted.own_work = adapted.on_device(state), False
    sent = [
        sum(4 * rank * sum(adapted.layer.shape) for adapted in judged.layers.values())
        for rank in ranks
    ]
    return told(trial, course, judged.inner.model, started_s, sent)


# ── zeroth order ─────────────────────────────────────────────────────────────────────────
def zeroth(trial: Trial, estimator: Literal["decomfl", "kseed"]) -> Outcome:
    """Eight peers; a round is K local steps of P directions, or of one from the pool."""
    started_s, course = time.monotonic(), course_of(trial.base, trial.size.tokens)
    size = trial.size
    spec = ZerothSpec(estimator=estimator, perturbations=size.perturbations, steps=size.steps)
    run = manifest_of(trial, course, "zo", zeroth=spec)
    streams = course.streams(trial)
    signers = [Signer(bytes([number + 1]) * 32) for number in range(len(streams))]
    methods = []
    for signer in signers:
        model = with_adapters(course.model(), run.method, run.model.seed)
        methods.append(ZerothMethod(model, partial(rules_of, run), CPU, signer))
    most = [0] * len(methods)
    for number in range(size.rounds):
        for peer, (method, stream) in enumerate(zip(methods, streams, strict=True)):
            # kseed's draws are nobody else's business, and so are unseeded dice in a run.
            method._rng = random.Random(f"{trial.seed}/{number}/{peer}")
            for _ in range(size.steps):
                method.step(stream.next_batch())
        sent = close_signed(methods, signers)
        most = [max(pair) for pair in zip(most, sent, strict=True)]
    with methods[0].outer_model() as model:
        return told(trial, course, model, started_s, most)


def close_signed(methods: Sequence[ZerothMethod], signers: Sequence[Signer]) -> list[int]:
    """Everybody contributes, the first one makes the record, everybody applies. Bytes by peer.

    Raises:
        BenchError: an entry or the record was refused.
    """
    reducer = methods[0].reducer()
    assert isinstance(reducer, RecordReducer)
    rows, sent = [], []
    for method, signer in zip(methods, signers, strict=True):
        part = method.contribution(range(1))
        (entry,) = part.encode(0, 1)
        sent.append(len(entry))
        if part.weight > 0:
            reducer.check(0, entry)
            rows.append((PeerId(signer.peer_id), part.weight, entry))
    reduced = reducer.reduce_signed(0, methods[0].digest(), sorted(rows))
    if reduced.refused:
        raise BenchError(f"an entry was refused: {reduced.refused[0][1]}")
    for method in methods:
        method.apply([reduced.payload], np.array([True]))
        if method.refusal:
            raise BenchError(f"a record was refused: {method.refusal}")
    return sent


def mezo_pooled(trial: Trial) -> Outcome:
    """Centralised: as many steps, each on everybody's samples, along DeComFL's directions."""
    started_s, course = time.monotonic(), course_of(trial.base, trial.size.tokens)
    size = trial.size
    spec = ZerothSpec(perturbations=size.perturbations, steps=size.steps)
    run = manifest_of(trial, course, "zo", zeroth=spec)
    model = with_adapters(course.model(), run.method, run.model.seed).eval()
    weights = Weights(model)
    rules = rules_of(run, weights.digest())
    streams = course.streams(trial)
    for number in range(size.rounds):
        for seeds in seeds_of(rules, number):
            batch = torch.cat([stream.next_batch() for stream in streams])
            loss = partial(next_token_loss, model, batch, CPU)
            mezo.step(weights, loss, seeds, run.zeroth.eps, trial.lr)
    return told(trial, course, model, started_s)


# ── anarchic ─────────────────────────────────────────────────────────────────────────────
def anarchic(trial: Trial, rule: Rule) -> Outcome:
    """Four workers with two tasks each, by plain SGD on adapters; `rounds` arrivals in all."""
    started_s, course = time.monotonic(), course_of(trial.base, trial.size.tokens)
    run = manifest_of(trial, course, "lora")
    inner = Inner(with_adapters(course.model(), run.method, run.model.seed), run.inner, CPU)
    inner.model.eval()
    streams = course.streams(trial)
    signers = [Signer(bytes([number + 1]) * 32) for number in range(len(ARRIVALS))]
    identity = bytes(32)
    table = Anarchic(
        rule, identity, inner.layout, per_step=PER_STEP,
        versions_behind_max=trial.size.rounds, memory_versions=trial.size.rounds,
    )  # fmt: skip
    dice = random.Random(f"arrivals/{trial.seed}")
    common_N = inner.to_numpy()
    pulled = [(0, common_N.copy()) for _ in ARRIVALS]
    for number in range(trial.size.rounds):
        (worker,) = dice.choices(range(len(ARRIVALS)), ARRIVALS)
        steps = dice.randint(1, LOCAL_STEPS_MAX)
        version, start_N = pulled[worker]
        inner.load(start_N)
        own = streams[WORKER_TASKS * worker : WORKER_TASKS * (worker + 1)]
        for _ in range(steps):
            _sgd(inner, torch.cat([stream.next_batch() for stream in own]), trial.lr)
        update_N = mean_gradient(start_N, inner.to_numpy(), trial.lr, steps)
        push = make_push(
            signers[worker], identity, inner.layout, update_N,
            sequence=number + 1, version=version, steps=steps,
        )  # fmt: skip
        for effect in table.handle(Pushed(PeerId(signers[worker].peer_id), push), 0.0):
            if not isinstance(effect, Move):
                raise BenchError(f"a push from version {version} was too old")
            common_N = common_N - np.float32(OUTER_STEPS * trial.lr) * effect.direction_N
        pulled[worker] = (table.version, common_N.copy())
    with inner.holding(common_N) as model:
        return told(trial, course, model, started_s)


def _sgd(inner: Inner, batch: torch.Tensor, lr: float) -> None:
    """One step of plain SGD, its gradient no longer than 1."""
    if not learned_tokens(batch):
        return
    loss = next_token_loss(inner.model, batch, CPU)
    loss.backward()  # type: ignore[no-untyped-call]
    trained = [p for p in inner.model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    with torch.no_grad():
        for parameter in trained:
            assert parameter.grad is not None
            parameter.sub_(lr * parameter.grad)
            parameter.grad.zero_()
