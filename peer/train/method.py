"""The plug between training and the network: `Method`, and what it gives and takes.

A method turns local work into a contribution with a weight, and applies the round's outcome.
The network cuts a contribution into numbered *units* (a chunk of a flat vector, or the factors of
one adapted layer), reduces each unit at one aggregator, and hands everybody the same coded bytes
back; so a method must be deterministic in `apply` (separate multiplications and additions in
float32, no fused ones) or replicas drift apart.

Threads: `Method` is touched only by the training thread. `Contribution.encode` and `Reducer` run
in the codec thread, one call at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from peer.state_chunks import StateGrid
from peer.train.mixing import UnitMixer
from peer.train.mixtable import MixTable
from protocols.fragments import Fragments
from protocols.types import PeerId
from tensorcodecs import Reduced

if TYPE_CHECKING:
    import torch  # the interface needs no more of it than a name

ArrayMap = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One inner step: its loss (nats per token, mean) and how many tokens it saw."""

    loss: float
    tokens: int


class Contribution(Protocol):
    """Frozen local work of one round. `encode` may be called again: an aggregator may die."""

    @property
    def weight(self) -> float:
        """Tokens behind it; 0 means there is nothing to send."""

    @property
    def snr_db(self) -> tuple[float, float] | None:
        """(wished for, least) signal-to-noise ratio in decibels, if each link may choose its own
        codec; None if the method has."""

    def encode(self, start: int, stop: int, codec: str | None = None) -> list[bytes]:
        """The coded bytes of units start..stop-1, each at most `limits.UNIT_BYTES_MAX`.
        Deterministic. `codec`: what the link chose, if it was asked."""


class Reducer(Protocol):
    """Turns coded contributions into coded means, unit by unit. Keeps nothing between calls."""

    def check(self, unit: int, payload: bytes) -> None:
        """Look a stranger's unit over as it arrives: whole, and of the right kind and size.

        Raises:
            ValueError: it is not (`tensorcodecs.DecodeError` is one).
        """

    def reduce(self, unit: int, parts: Sequence[tuple[float, bytes]]) -> Reduced:
        """The coded weighted mean of (weight, payload) pairs, all of which passed `check`, in
        this order. A pure function: whoever has the same parts (and, where a method adds changes to
        its outer state, the same state) gets the same bytes."""


@runtime_checkable
class SummingReducer(Reducer, Protocol):
    """A reducer whose means are contributions themselves, of as much weight as what is in them:
    so a region can sum up before what it has goes a long way (`protocols.regions`)."""

    def check_sum(self, unit: int, payload: bytes) -> None:
        """As `check`, of what `reduce` made."""


@runtime_checkable
class SignedReducer(Reducer, Protocol):
    """A reducer of contributions that their authors signed: it is told who sent which, and for
    which state, so that payloads need not say so themselves. Such are reduced here alone, and
    `reduce` is not called."""

    def reduce_signed(
        self, unit: int, base: bytes, parts: Sequence[tuple[PeerId, float, bytes]]
    ) -> Reduced:
        """What becomes of (sender, weight, payload) triples, in order of the senders, in a round
        that starts at the outer state with the digest `base`. `Reduced.refused`: indices of parts
        whose signature, or content, is wrong. A pure function like `reduce`."""


class Method(Protocol):
    """A way to train. Built by `peer.train.build_method` from a manifest, or by an embedder."""

    units: int
    """How many units a contribution has; the same on every peer of the run."""
    fragments: Fragments
    """How the units are cut into what a round exchanges: `schedule.fragments` parts, the same on
    every peer of the run."""
    mixes: MixTable | None
    """Which mixes with other groups are in the outer state, of which it is part; None: this method
    does not mix, and `mixer` and `outer` are never called. Changed by `apply` and `load_state`
    only; others may look at it meanwhile."""

    carries: bool
    """Whether local work that missed an outcome goes into the next contribution; else an outcome
    that changes the state ends it."""

    @property
    def idle(self) -> bool:
        """Whether further local work is worth nothing before an outcome or a state has come: then
        no steps are asked for. Changed by calls of this method alone."""

    @property
    def refusal(self) -> str:
        """Why the latest outcome did not change the state, where its aggregator is to blame; else
        ""."""

    def step(self, batch: torch.Tensor) -> StepResult:
        """One inner step on `batch`: stacked samples, (B, T) or (B, 3, T) int64. Moves it to the
        device itself."""

    def contribution(self, units: range) -> Contribution:
        """Freeze the work of these units, one of the fragments, since the last one that held them,
        and remember where it ended. Training goes on."""

    def owes(self) -> bool:
        """Whether any unit had local work that no outcome contains when the last contribution was
        frozen. One of no weight that owes nothing stands for work that was thrown away."""

    def apply(self, outcome: Sequence[bytes], mine: npt.NDArray[np.bool_], first: int = 0) -> None:
        """Apply one round: a coded payload per unit (b"" = no change) from unit `first` on, all of
        a fragment's, to the outer state. Where the method mixes, one may be a mean with mixes
        beside it (`peer.train.composite`).

        `mine[unit - first]` says whether this peer's last contribution is inside that unit's mean.
        Local progress made since the contribution was frozen is kept; where `mine` is False the
        frozen work is kept too and so counts the next time.
        """

    def reducer(self) -> Reducer:
        """How this method's contributions are averaged. It is used in the codec thread."""

    def mixer(self) -> UnitMixer:
        """How this method's outer state is mixed with another group's. Used in the codec thread."""

    def outer(self, start: int, stop: int) -> list[npt.NDArray[np.float32]]:
        """Copies of the outer state of units start..stop-1, each (S, U): those that are mixed
        first, of them the parameters first; what tells a step's typical size (the momentum) last.
        From any thread: one that is just being changed may be half old and half new, which is near
        enough for a mix."""

    def state(self) -> ArrayMap:
        """The outer state, the same on every peer: copies, safe to keep. Names are stable."""

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace the outer state; local progress is dropped.

        Raises:
            ValueError: names, shapes or types are not this method's.
        """

    def reconcile(self, arrays: Mapping[str, npt.NDArray[Any]], tokens: float, rounds: int) -> None:
        """Replace the outer state and keep what was learned locally: the next contribution carries
        the difference, which is the work of `tokens` tokens in so many `rounds` of the others.

        A method that can't do this may treat it as `load_state`.

        Raises:
            ValueError: like `load_state`.
        """

    def digest(self) -> bytes:
        """Of the outer state (32 bytes), equal on every peer in step: what `grid` makes of it
        (`peer.state_chunks.ChunkHashes` hashes only what changed)."""

    @property
    def grid(self) -> StateGrid:
        """How `state()` is cut into chunks, the same on every peer of the run that stands there."""

    def inner_state(self) -> ArrayMap:
        """The inner optimiser's own memory, this peer's business; may be empty."""

    def load_inner_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore `inner_state`; ignores what does not fit."""

    def evaluate(self, batches: Iterable[torch.Tensor]) -> float:
        """Mean loss (nats per token) of the *outer* parameters, without training on them."""

    def export(self, folder: str) -> None:
        """Write the outer parameters as a transformers model folder (safetensors only)."""


class ModelMethod(Method, Protocol):
    """A method that trains a transformers model: what `peer.train.build_method` gives."""

    refused_units: int
    """Units of outcomes that could not be read and so changed nothing, on any peer alike."""
    dropped_work: int
    """Contributions dropped because they were not finite."""

    @property
    def parameters(self) -> int:
        """All parameters of the model, frozen ones too, tied ones once."""

    @property
    def device(self) -> torch.device: ...

    def outer_model(self) -> AbstractContextManager[torch.nn.Module]:
        """The model with the outer parameters, for sampling and export; in the training thread."""


class DataSource(Protocol):
    """Blocks of training tokens. The network says which blocks are this peer's.

    A sample is (T,) int64 ids, or (3, T) where it says which tokens are learned and where texts
    begin (`peer.train.samples`); all samples of a source are of one kind.
    """

    blocks: int
    """How many blocks there are; a block is a contiguous range of samples."""

    def block(self, index: int, epoch: int) -> list[torch.Tensor]:
        """The samples of a block, the same on every peer for the same epoch."""

    def validation(self) -> list[torch.Tensor]:
        """Held-out samples, never in any block; the same on every peer."""
