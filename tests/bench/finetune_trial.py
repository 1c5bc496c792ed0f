"""One training of the small base model by eight peers, each with a task of its own, in one place.

Rounds are the product's without its network: each peer is a `Method` of `peer/train` and gives what
it would send; one of them reduces, with its own reducer, what has been checked as a stranger's
would be; everybody applies the outcome. What is not a run's method yet (anarchic steps) or never
will be (the baselines) is put together from `peer/finetune` in `finetune_others`.

A `Trial` says everything that the result depends on, so that results can be kept by it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from peer.manifest import (
    Asset,
    CodecSpec,
    DataSpec,
    InnerSpec,
    Manifest,
    MethodSpec,
    ModelSpec,
    ScheduleSpec,
)
from peer.train.chat import ChatBlocks
from peer.train.chat_format import plain
from peer.train.conversation import Example
from peer.train.flat import FrozenWork
from peer.train.hybrid import HybridMethod
from peer.train.inner import Inner
from peer.train.lora import LoraMethod, with_adapters
from peer.train.means import Means
from peer.train.models import load_folder
from peer.train.rows import ChatRows
from peer.train.scoring import Score, score
from peer.train.stream import BlockStream
from peer.train.tokens import FileTokenizer
from peer.train.windows import Windows
from tests.bench.result import BenchError

CPU: Final = torch.device("cpu")
WARMUP_STEPS: Final = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How long peers train, and how large adapters are."""

    tokens: int = 128
    """In a sample."""
    batch: int = 4
    """Samples in a local step."""
    rounds: int = 6
    steps: int = 50
    """K, a peer's local steps in a round."""
    rank: int = 8
    """Of adapters, or of a hybrid run's common state."""
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    """Ends of the names of adapted layers; empty: all linear ones."""
    perturbations: int = 4
    """P, a zeroth-order peer's directions in a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One training."""

    way: str
    """What is trained; see `finetune_worker.WAYS`."""
    base: str
    """The folder of a `finetune_base.Base`; its name is a hash of all that is in it."""
    seed: int
    lr: float
    """Of a local step."""
    size: Size = field(default_factory=Size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How it went. Lists are by client, in the base's order."""

    nats: Sequence[float]
    """All that the held-out answers take ..."""
    tokens: Sequence[int]
    """... and how many tokens they have."""
    sent_bytes: Sequence[int] = ()
    """The most that each peer sent in a round; 0: it was not there."""
    tail: float = 0.0
    """Norm of what the last round's mean lost to the rank, over all layers."""
    seconds: float = 0.0

    def loss(self, of: Sequence[int] | None = None) -> float:
        """Nats per token of the answers of these clients, by default of all."""
        chosen = range(len(self.tokens)) if of is None else of
        return sum(self.nats[i] for i in chosen) / sum(self.tokens[i] for i in chosen)


class Course:
    """What all trials on a base share: its weights, everybody's questions, the held-out ones."""

    def __init__(self, base: Path, tokens: int) -> None:
        facts = json.loads((base / "facts.json").read_text("utf-8"))
        self.config: dict[str, Any] = facts["config"]
        self.clients: list[int] = facts["clients"]
        tokenizer = FileTokenizer(base / "tokenizer" / "tokenizer.json")
        self.windows = Windows(tokenizer, plain(tokenizer), tokens)
        self.assets = tuple(
            Asset(name=name, sha256=hashlib.sha256(raw).hexdigest(), bytes=len(raw))
            for name in ("model/model.safetensors", "tokenizer/tokenizer.json")
            for raw in [(base / name).read_bytes()]
        )
        self._model = load_folder(base / "model")
        self._blocks = [
            ChatBlocks(
                [base / f"client_{client}.json"], tokenizer, plain(tokenizer),
                sequence_length=tokens, block_samples=8,
                validation_share=0.0, validation_samples=1,
            )
            for client in self.clients
        ]  # fmt: skip
        self._held_out: list[list[Example]] = []
        for client in self.clients:
            rows = ChatRows([base / f"eval_{client}.json"], self.windows.check)
            self._held_out.append(rows.read(range(len(rows))))

    def model(self) -> torch.nn.Module:
        """The base, a copy."""
        return copy.deepcopy(self._model)

    def stream(self, client: int, trial: Trial) -> BlockStream:
        """What a client trains on; the same batches in every way to train."""
        return BlockStream(
            self._blocks[client], batch_size=trial.size.batch, seed=trial.seed, peer=str(client)
        )

    def streams(self, trial: Trial) -> list[BlockStream]:
        """Of all clients."""
        return [self.stream(client, trial) for client in range(len(self.clients))]

    def judge(self, model: torch.nn.Module) -> tuple[list[float], list[int]]:
        """(nats, tokens) of each client's held-out answers."""
        nats, tokens = [], []
        for examples in self._held_out:
            total = Score()
            for found in score(model, self.windows, examples):
                total += found
            nats.append(total.nats)
            tokens.append(total.tokens)
        return nats, tokens


@cache
def course_of(base: str, tokens: int) -> Course:
    """Read once in a process."""
    return Course(Path(base), tokens)


def manifest_of(
    trial: Trial, course: Course, kind: Literal["lora", "hybrid", "zo"], **more: Any
) -> Manifest:
    """The run that the trial is. `more`: fields of the manifest, and of its `method`."""
    size = trial.size
    method = more.pop("method", {})
    return Manifest(
        name="finetune",
        model=ModelSpec(config=course.config, tokenizer="file", seed=trial.seed),
        data=DataSpec(source="chat", sequence_length=size.tokens),
        method=MethodSpec(
            kind=kind, rank=size.rank, alpha=size.alpha, targets=size.targets, **method
        ),
        inner=InnerSpec(lr=trial.lr, warmup_steps=WARMUP_STEPS, batch_size=size.batch),
        schedule=ScheduleSpec(gossip_every=0),
        assets=course.assets,
        **more,
    )


@dataclass(frozen=True, slots=True)
class Closed:
    """A round's end."""

    outcome: list[bytes]
    """A coded payload for each unit."""
    sent_bytes: list[int]
    """By each peer."""
    tail: float


def close_round(methods: Sequence[LoraMethod | HybridMethod]) -> Closed:
    """Everybody contributes, the first one reduces, everybody applies.

    Raises:
        BenchError: a contribution was refused; here nobody lies.
    """
    parts: list[FrozenWork] = [m.contribution(range(m.units)) for m in methods]
    coded = [part.encode(0, methods[0].units) for part in parts]
    reducer = methods[0].reducer()
    outcome: list[bytes] = []
    for unit in range(methods[0].units):
        for payloads in coded:
            reducer.check(unit, payloads[unit])
        pairs = [(part.weight, own[unit]) for part, own in zip(parts, coded, strict=True)]
        reduced = reducer.reduce(unit, [pair for pair in pairs if pair[0] > 0])
        if reduced.refused:
            raise BenchError(f"a contribution was refused: {reduced.refused[0][1]}")
        outcome.append(reduced.payload)
    for method, part in zip(methods, parts, strict=True):
        method.apply(outcome, np.full(method.units, part.weight > 0))
    if len({method.digest() for method in methods}) != 1:
        raise BenchError("peers that applied the same outcome hold different states")
    tails = getattr(reducer, "tails", None)
    lost = list(tails.values()) if tails is not None else getattr(methods[0], "tails", [0.0])
    return Closed(outcome, [sum(map(len, own)) for own in coded], float(np.linalg.norm(lost)))


def told(
    trial: Trial, course: Course, model: torch.nn.Module, started_s: float,
    sent_bytes: Sequence[int] = (), tail: float = 0.0,
) -> Outcome:  # fmt: skip
    nats, tokens = course.judge(model)
    return Outcome(
        nats=nats, tokens=tokens, sent_bytes=list(sent_bytes), tail=tail,
        seconds=time.monotonic() - started_s,
    )  # fmt: skip


def untrained(trial: Trial) -> Outcome:
    """The base as it is."""
    started_s, course = time.monotonic(), course_of(trial.base, trial.size.tokens)
    return told(trial, course, course.model(), started_s)


# ── runs of kind `lora` ──────────────────────────────────────────────────────────────────
def lora_peer(
    trial: Trial, course: Course, aggregate: Literal["exact", "fedit"] = "exact"
) -> LoraMethod:
    """One peer of a `lora` run."""
    run = manifest_of(trial, course, "lora", method={"aggregate": aggregate})
    model = with_adapters(course.model(), run.method, run.model.seed)
    return LoraMethod(Inner(model, run.inner, CPU), run.method)


def lora(trial: Trial, aggregate: Literal["exact", "fedit"]) -> Outcome:
    """Eight peers, a round every K steps."""
    started_s, course = time.monotonic(), course_of(trial.base, trial.size.tokens)
    streams = course.streams(trial)
    methods = [lora_peer(trial, course, aggregate) for _ in streams]
    closed = Closed([], [], 0.0)
    for _ in range(trial.size.rounds):
        for method, stream in zip(methods, streams, strict=True):
            for _ in range(trial.size.steps):
                method.step(stream.next_batch())
        closed = close_round(methods)
    with methods[0].outer_model() as model:
        return told(trial, course, model, started_s, closed.sent_bytes, closed.tail)


def pooled(trial: Trial) -> Outcome:
    """Centralised: as many steps, each on everybody's samples, by one peer that has them all."""
    started_s, course = time.monotonic(), course_of(trial.base, trial.size.tokens)
    streams = course.streams(trial)
    method = lora_peer(trial, course)
    for _ in range(trial.size.rounds * trial.size.steps):
        method.step(torch.cat([stream.next_batch() for stream in streams]))
    close_round([method])
    with method.outer_model() as model:
        return told(trial, course, model, started_s)


# ── runs of kind `hybrid` ────────────────────────────────────────────────────────────────
def hybrid(
    trial: Trial,
    means: Mapping[int, Means],
    codec: str = "fp32",
    spread: Mapping[str, float] | None = None,
) -> Outcome:
    """A peer for each client that has means, a round every K steps. `spread`: fields of the
    manifest's method, against drift."""
    started_s, course = time.monotonic(), course_of(trial.base, trial.size.tokens)
    run = manifest_of(
        trial, course, "hybrid", codec=CodecSpec(name=codec), method=dict(spread or {})
    )
    streams = [course.stream(client, trial) for client in means]
    methods = [
        HybridMethod(course.model(), run, CPU, own, seed=1000 * trial.seed + client)
        for client, own in means.items()
    ]
    most = [0] * len(course.clients)
    closed = Closed([], [], 0.0)
    for _ in range(trial.size.rounds):
        for method, stream in zip(methods, streams, strict=True):
            for _ in range(trial.size.steps):
                method.step(stream.next_batch())
        closed = close_round(methods)
        for client, sent in zip(means, closed.sent_bytes, strict=True):
            most[client] = max(most[client], sent)
    with methods[0].outer_model() as model:
        return told(trial, course, model, started_s, most, closed.tail)


def shorter(trial: Trial, **changes: Any) -> Trial:
    """The trial with another size."""
    return replace(trial, size=replace(trial.size, **changes))
