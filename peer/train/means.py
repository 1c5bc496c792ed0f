"""What a peer of a hybrid run can afford: its owner's wish, or a look at memory, compute and link.

    auto        decided here, by the rules below
    lora:RANK   first order, factors of that rank; `lora` alone: the run's rank
    zo:P        zeroth order, P directions a step; `zo` alone: as many as its speed allows
    full        first order, every value of the adapted layers, sent by the run's codec
    full:K      the same, sent as the best product of rank K; the rest waits for the next rounds

`auto` takes the largest rank, halving the run's, whose gradients fit into `MEMORY_SHARE` of the
free memory and whose factors fit into the link's part of a round; where not even rank 1 does, it
goes without gradients. It never takes `full`: what comes back has the run's rank anyway, so that
pays only for who wishes it. What it decided and why is said in words (`Means.why`).

Memory is estimated: 4 bytes a frozen value, 16 a trained one (value, gradient, two moments), and
activations in float32 after Korthikanti et al. (arXiv 2205.05198, equation 1: 34 s b h + 5 a s^2 b
bytes a layer at 16 bits; twice that here), and three times the logits. Without gradients one
layer's activations live at a time.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from peer.errors import UsageError

if TYPE_CHECKING:
    import torch

    from peer.manifest import Manifest

Kind = Literal["lora", "zo", "full"]

MEMORY_SHARE: Final = 0.8  # of what is free: others want some, and estimates are rough
DIRECTIONS_MAX: Final = 64
DIRECTIONS: Final = 8  # a step, where speed allows it
STEPS_A_ROUND: Final = 4  # fewer, and a round's exchange costs more than it brings
RANK_OF_SEEDS: Final = 2  # of a zeroth-order peer: every value more is noise more
_WISH: Final = re.compile(r"(auto|full(:\d{1,4})?|lora(:\d{1,4})?|zo(:\d{1,2})?)")


@dataclass(frozen=True, slots=True)
class Wish:
    """What the owner said."""

    kind: Literal["auto", "lora", "zo", "full"] = "auto"
    number: int = 0
    """The rank (of what is sent, for `full`), or the directions a step; 0: not said."""

    @classmethod
    def parse(cls, text: str) -> Wish:
        """
        Raises:
            UsageError: it is none.
        """
        if _WISH.fullmatch(text) is None:
            raise UsageError(
                f"--method {text[:40]!r} is none; say auto, lora:RANK, zo:P, full or full:K"
            )
        kind, _, number = text.partition(":")
        if number and int(number) < 1:
            raise UsageError(f"--method {text}: must be at least 1")
        if kind == "zo" and number and int(number) > DIRECTIONS_MAX:
            raise UsageError(f"--method {text}: at most {DIRECTIONS_MAX} directions a step")
        return cls(kind, int(number or 0))  # type: ignore[arg-type]  # the pattern has said so


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What there is to train with."""

    free_bytes: int
    flops: float
    """Multiplications and additions a second, of a matrix product in float32."""
    upload_bps: float | None = None
    """The owner's budget; None: not limited, so not asked about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What there is to train."""

    parameters: int
    layers: Sequence[tuple[int, int]]
    """(m, n) of the adapted ones."""
    blocks: int
    """Transformer blocks."""
    hidden: int
    heads: int
    vocabulary: int
    batch: int
    length: int
    """Tokens in a sample."""
    rank: int
    """The run's."""
    bits: float
    """A value on the wire."""
    link_s: float
    """Of a round, that an exchange may take."""
    round_s: float

    @property
    def activation_bytes(self) -> int:
        """Of one block, in float32."""
        tokens = self.batch * self.length
        return 2 * (34 * tokens * self.hidden + 5 * self.heads * self.length * tokens)

    @property
    def logit_bytes(self) -> int:
        """The logits, their softmax and their gradient."""
        return 3 * 4 * self.batch * self.length * self.vocabulary

    def values(self, rank: int) -> int:
        """In factors of that rank."""
        return sum(rank * (m + n) for m, n in self.layers)

    def bytes_first_order(self, trained: int) -> int:
        """Memory to train so many values with gradients."""
        frozen = 4 * (self.parameters + self.values(self.rank))
        return frozen + 16 * trained + self.blocks * self.activation_bytes + self.logit_bytes

    def bytes_zeroth_order(self) -> int:
        """Memory without gradients."""
        frozen = 4 * (self.parameters + self.values(self.rank))
        return frozen + 8 * self.values(RANK_OF_SEEDS) + self.activation_bytes + self.logit_bytes

    def upload_s(self, rank: int, bps: float) -> float:
        return self.values(rank) * self.bits / bps

    def directions(self, flops: float) -> int:
        """As many as leave `STEPS_A_ROUND`, at 2 passes of 2 operations a parameter each."""
        tokens = self.batch * self.length
        passes_s = 4.0 * self.parameters * tokens / flops
        return max(1, min(DIRECTIONS, int(self.round_s / STEPS_A_ROUND / passes_s)))


@dataclass(frozen=True, slots=True)
class Means:
    """What was decided."""

    kind: Kind
    rank: int
    """Of the own factors; of `full`: of what is sent, or 0 for all values."""
    perturbations: int = 0
    """zo: directions a step."""
    why: str = ""
    """In words."""


def decide(wish: Wish, job: Job, machine: Machine, admit: Sequence[str]) -> Means:
    """See the module.

    Raises:
        UsageError: the wish is more than the run has, or of a kind that it does not admit.
    """
    needs = {"lora": ("lowrank",), "zo": ("seeds",), "full": ("dense", "sparse", "lowrank")}
    if wish.kind == "full" and wish.number:
        needs["full"] = ("lowrank",)
    if wish.kind != "auto":
        if not set(needs[wish.kind]) & set(admit):
            raise UsageError(
                f"--method {wish.kind}: this run admits {', '.join(admit)} only; choose another"
            )
        if wish.kind in ("lora", "full") and wish.number > job.rank:
            raise UsageError(
                f"--method {wish.kind}:{wish.number}: the run's rank is {job.rank}; choose at most"
                " that"
            )
        if wish.kind == "lora":
            return Means("lora", wish.number or job.rank, why="as its owner wishes")
        if wish.kind == "zo":
            tried = wish.number or job.directions(machine.flops)
            rank = min(RANK_OF_SEEDS, job.rank)
            return Means("zo", rank, tried, "as its owner wishes")
        return Means("full", wish.number, why="as its owner wishes")
    return _by_the_machine(job, machine, admit)


def _by_the_machine(job: Job, machine: Machine, admit: Sequence[str]) -> Means:
    room = MEMORY_SHARE * machine.free_bytes
    free = f"of {_size(machine.free_bytes)} free"
    rank, lacks = job.rank if "lowrank" in admit else 0, "the run admits no factors"
    while rank >= 1:
        need = job.bytes_first_order(job.values(rank))
        late = machine.upload_bps is not None and (
            job.upload_s(rank, machine.upload_bps) > job.link_s
        )
        if need <= room and not late:
            why = f"gradients need about {_size(need)} {free}"
            if machine.upload_bps is not None:
                seconds = job.upload_s(rank, machine.upload_bps)
                why += f"; to upload takes {seconds:.2g} s, at most {job.link_s:.2g} s a round"
            return Means("lora", rank, why=why)
        lacks = (
            f"gradients would need about {_size(need)} {free}"
            if need > room
            else f"to upload rank {rank} would take more than {job.link_s:.2g} s a round"
        )
        rank //= 2
    if "seeds" not in admit:
        least: Kind = "full" if "lowrank" not in admit else "lora"
        rank = 0 if least == "full" else 1
        return Means(least, rank, why=f"{lacks}, but this run admits no seeds: it may not fit")
    tried = job.directions(machine.flops)
    why = f"{lacks}; without them about {_size(job.bytes_zeroth_order())}"
    return Means("zo", min(RANK_OF_SEEDS, job.rank), tried, why)


# ── a look around ────────────────────────────────────────────────────────────────────────
def job_of(
    manifest: Manifest, model: torch.nn.Module, layers: Sequence[tuple[int, int]], bits: float
) -> Job:
    """What the manifest's run asks of a peer. `bits`: a value on the wire."""
    from peer.train.models import count_parameters

    config: Any = model.config
    return Job(
        parameters=count_parameters(model),
        layers=layers,
        blocks=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        heads=int(config.num_attention_heads),
        vocabulary=int(config.vocab_size),
        batch=manifest.inner.batch_size,
        length=manifest.data.sequence_length,
        rank=manifest.method.rank,
        bits=bits,
        link_s=manifest.schedule.round_s * manifest.schedule.exchange_share,
        round_s=manifest.schedule.round_s,
    )


def look_around(device: torch.device, upload_bps: float | None) -> Machine:
    """Free memory where the model will be, and how fast a matrix product is. About 0.1 s."""
    import torch

    cuda = device.type == "cuda"
    free = int(torch.cuda.mem_get_info(device)[0]) if cuda else _available_bytes()
    side = 512
    with torch.no_grad():
        x = torch.ones(side, side, device=device)
        float((x @ x)[0, 0])  # loads what has to be loaded
        begun, count = time.perf_counter(), 4
        for _ in range(count):
            x = (x @ x).clamp_(max=1.0)
        float(x[0, 0])
        seconds = max(1e-6, time.perf_counter() - begun)
    return Machine(free_bytes=free, flops=2.0 * side**3 * count / seconds, upload_bps=upload_bps)


def _available_bytes() -> int:
    """What the system would give without swapping; where it does not say, all there is."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(count: float) -> str:
    from peer.observe.words import size

    return size(int(count))
