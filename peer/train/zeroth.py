"""Zeroth-order rounds: a contribution is a signed entry of seeds' scalars, an outcome is the record
of the entries, and the state is the log of the records (`peer/finetune/zeroth.py`).

An aggregator makes the record out of the entries that came in, which each member checks: it can
leave entries out, and change none. What was measured at one state is worth nothing at the next, so
a peer stands still from its contribution to the outcome, and work that missed it is lost.

Nothing as large as the model is ever sent or hashed. The state is the bytes of the seed file, which
are the same for everybody who stands there, and the digest is over these: so it vouches for a
summary too, which the log's head alone does not.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from peer.finetune import scalars
from peer.finetune.local_work import LocalWork
from peer.finetune.perturb import warm_up
from peer.finetune.seed_rules import SeedRules
from peer.finetune.seedfile import GrowingBytes, from_bytes
from peer.finetune.seedlog import SUMMARY_BYTES_MAX, SeedLog, record_of
from peer.finetune.tensors import Weights
from peer.finetune.zeroth import ZerothPeer
from peer.state_chunks import StateGrid, TensorNote, leaf_of
from peer.train.base_values import mapped
from peer.train.inner import mean_loss, next_token_loss, save_model
from peer.train.lora import save_merged
from peer.train.method import ArrayMap, Reducer, StepResult
from peer.train.mixing import UnitMixer
from peer.train.mixtable import MixTable
from peer.train.samples import learned_tokens
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.fragments import Fragments
from protocols.identity import Signer
from protocols.types import PeerId
from tensorcodecs import Reduced

LOG: Final = "log"
"""What the state calls its one array: a seed file's bytes."""
LOG_BYTES_MAX: Final = 16 * 2**20
"""Of records; then everybody sums them up, in the same round. 15,000 rounds of eight peers with
decomfl's 100 bytes, 2,000 of kseed's after 200 steps: so much a checkpoint and a late joiner take
at most, and a summary."""
FRAMES_BYTES_MAX: Final = LOG_BYTES_MAX // 2  # 36 to a record of a hundred and more
PROGRESS_S: Final = 5.0  # between two words of how far a replay is

_NOBODY: Final = PeerId("")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SignedWork:
    """A contribution: this peer's entry, or nothing."""

    weight: float
    entry: bytes
    snr_db: tuple[float, float] | None = None

    def encode(self, start: int, stop: int, codec: str | None = None) -> list[bytes]:
        return [self.entry] * (stop - start)


class _Place(NamedTuple):
    """Where the log is, and what names the state."""

    digest: bytes
    number: int
    head: bytes


class RecordReducer:
    """Makes the round's record of the entries that their authors signed for its state."""

    def __init__(self, rules: SeedRules, place: Callable[[], _Place]) -> None:
        """`place`: where this peer's log is, asked from another thread."""
        self._rules = rules
        self._place = place
        self._sizes = scalars.entry_bytes_min(rules), scalars.entry_bytes_max(rules)

    def check(self, unit: int, payload: bytes) -> None:
        """See `Reducer.check`; who signed what, and for which state, is looked at later."""
        low, high = self._sizes
        if not low <= len(payload) <= high:
            raise ValueError(f"an entry of {len(payload)} bytes, not {low} to {high}")

    def reduce(self, unit: int, parts: Sequence[tuple[float, bytes]]) -> Reduced:
        """Never called: entries are nobody's without their senders."""
        raise NotImplementedError("a zeroth-order round goes by who sent what")

    def reduce_signed(
        self, unit: int, base: bytes, parts: Sequence[tuple[PeerId, float, bytes]]
    ) -> Reduced:
        """See `SignedReducer.reduce_signed`: the record, or b"" where no entry holds."""
        place = self._place()
        if base != place.digest:
            return Reduced(b"", ())  # our state has moved on: whoever took this span over has it
        entries: dict[PeerId, bytes] = {}
        refused = []
        for index, (peer, weight, entry) in enumerate(parts):
            try:
                reading = scalars.decode(self._rules, peer, place.head, place.number, entry)
            except RemoteProtocolError as error:
                refused.append((index, error.reason))
                continue
            if reading.weight != weight:
                refused.append((index, f"weighs {reading.weight} and is said to weigh {weight:g}"))
                continue
            entries[peer] = entry
        payload = record_of(place.number, entries) if entries else b""
        return Reduced(payload, tuple(refused))


class ZerothMethod:
    """A `Method` whose outer state is a seed log. Memory: the model's, and a forward pass's; on the
    disk, the trainable values once more (`base_values`)."""

    units = 1
    mixes: MixTable | None = None
    carries = False

    def __init__(
        self,
        model: torch.nn.Module,
        rules: Callable[[bytes], SeedRules],
        device: torch.device,
        signer: Signer | None = None,
        *,
        half: bool | None = None,
        folder: Path | None = None,
        say: Say = lambda _: None,
    ) -> None:
        """Takes `model` over, with the run's base values in it; what is to be trained requires
        gradients.

        `rules`: the run's, given the digest of its base. `signer`: None for who only looks.
        `half`: whether losses are computed in bfloat16, this peer's own business; None: on CUDA.
        `folder`: where the base's values go; None: where temporary files do. `say`: told what
        takes long, in this thread.
        """
        self.device = device
        self.fragments = Fragments.cut([1], 1)
        self.refused_units = 0
        """Outcomes that changed nothing, on any peer alike."""
        self.dropped_work = 0
        """Contributions of slopes that were no numbers, or larger than the rules allow."""
        self.refusal = ""
        self._model = model.to(device).eval()
        self._half = device.type == "cuda" if half is None else half
        self._say = say
        warm_up(device, say)
        weights = Weights(model, rules(bytes(32)).master)
        self.rules = rules(weights.digest())
        base = mapped(weights.state(), folder)
        self._peer = ZerothPeer(model, SeedLog(self.rules), signer, base=base)
        self._origin = StateGrid(
            _described(0),
            b"murmuration/zeroth/1",  # the rules, and so run and base, are in the file
            grows={LOG: SUMMARY_BYTES_MAX + LOG_BYTES_MAX + FRAMES_BYTES_MAX},
        )
        self._chain = [bytes(32)]
        """decomfl: what each round's factors and those before them hash to. Element n: n rounds."""
        self._work: LocalWork | None = None
        self._sent = False
        self._said_slow = False
        self._rng = random.Random()
        self._file = GrowingBytes(self._peer.log)
        self._leaves: list[bytes] = []
        """The hashes of the file's whole chunks; the last one grows."""
        self.grid, self._place = self._placed()

    # ── for people ───────────────────────────────────────────────────────────────────────────
    @property
    def parameters(self) -> int:
        """All parameters of the model, frozen ones too, tied ones once."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def weights(self) -> Weights:
        """The trainable values; to be looked at."""
        return self._peer.weights

    # ── local work ───────────────────────────────────────────────────────────────────────────
    @property
    def idle(self) -> bool:
        return self._sent

    def step(self, batch: torch.Tensor) -> StepResult:
        tokens = learned_tokens(batch)
        if not tokens:
            return StepResult(math.nan, 0)
        if self._work is None:
            self._work = self._peer.begin()
        moved = batch.to(self.device, non_blocking=True)

        def loss() -> torch.Tensor:
            return next_token_loss(self._model, moved, self.device, self._half)

        if not self._work.step(loss, tokens, self._rng):
            return StepResult(math.nan, 0)
        assert self._work.last is not None
        return StepResult(self._work.last.loss, tokens)

    def contribution(self, units: range | None = None) -> SignedWork:
        work = self._work
        entry = None if work is None else self._peer.sign(work)
        if entry is None:
            if work is not None and work.tokens:
                self.dropped_work += 1
                self._drop_work()
            elif work is not None and work.steps and not self._said_slow:
                self._said_slow = True
                rules = self.rules
                self._say(
                    f"this machine did {work.steps} of the {rules.steps} local steps that a round"
                    " asks for and sends nothing of this round; a run with longer rounds"
                    " (schedule.round_s), or fewer steps or perturbations, would have its work"
                )
            return SignedWork(0.0, b"")
        self._sent = True
        number = self._place.number
        return SignedWork(float(scalars.read(self.rules, _NOBODY, number, entry).weight), entry)

    def owes(self) -> bool:
        return self._work is not None and self._work.steps > 0

    # ── rounds ───────────────────────────────────────────────────────────────────────────────
    def reducer(self) -> Reducer:
        return RecordReducer(self.rules, lambda: self._place)

    def apply(self, outcome: Sequence[bytes], mine: npt.NDArray[np.bool_], first: int = 0) -> None:
        if (len(outcome), first, mine.shape) != (1, 0, (1,)):
            raise ValueError(f"an outcome of {len(outcome)} units from {first} on, not of the one")
        self.refusal = ""
        self._sent = False
        if not outcome[0]:
            return  # the state is what it was, so what was measured still counts
        log = self._peer.log
        try:
            record = log.check(_NOBODY, outcome[0])
            where = f"record {record.number} of the seed log"
            if record.bans:
                raise RemoteProtocolError(_NOBODY, f"{where}: a ban, which nobody may say here")
            if not 0 < len(record.entries) <= limits.ROSTER_MAX:
                raise RemoteProtocolError(_NOBODY, f"{where}: {len(record.entries)} entries")
        except RemoteProtocolError as error:
            self.refusal = error.reason
            self.refused_units += 1
            return
        self._drop_work()
        log.take(outcome[0], record)
        self._peer.follow()
        self._lengthen(self._chain, log)
        self._file.append(outcome[0])
        if log.size > LOG_BYTES_MAX:
            shorter = SeedLog(self.rules, log.summary())
            self._peer.change(shorter, extends=True)
            self._begin_file(shorter)
        self.grid, self._place = self._placed()

    def mixer(self) -> UnitMixer:
        raise NotImplementedError("this method does not mix")

    def outer(self, start: int, stop: int) -> list[npt.NDArray[np.float32]]:
        raise NotImplementedError("this method does not mix")

    # ── states ───────────────────────────────────────────────────────────────────────────────
    def state(self) -> ArrayMap:
        return {LOG: np.frombuffer(bytes(self._file), np.uint8)}

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        raw = arrays.get(LOG)
        if set(arrays) != {LOG} or raw is None or raw.dtype != np.uint8 or raw.ndim != 1:
            raise ValueError(f"a state of {sorted(arrays)}, expected a seed log")
        told = _Told(self._say)
        try:
            log = from_bytes(self.rules, _NOBODY, raw.tobytes(), told.checked)
        except RemoteProtocolError as error:
            raise ValueError(error.reason) from None
        if log.banned:
            raise ValueError("the seed log has a ban, which nobody may say here")
        chain = [bytes(32)]
        self._lengthen(chain, log)
        own = self._chain
        # kseed's values are made from the base in any case.
        extends = self.rules.method == "decomfl" and chain[: len(own)] == own
        self._drop_work()
        self._sent = False
        self._peer.change(log, extends=extends, on_round=told.replayed)
        self._chain = chain
        self._begin_file(log)
        self.grid, self._place = self._placed()

    def reconcile(self, arrays: Mapping[str, npt.NDArray[Any]], tokens: float, rounds: int) -> None:
        """As `load_state`: what was measured at other values is worth nothing here."""
        self.load_state(arrays)

    def digest(self) -> bytes:
        return self._place.digest

    def inner_state(self) -> ArrayMap:
        return {}

    def load_inner_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        pass

    def evaluate(self, batches: Iterable[torch.Tensor]) -> float:
        with self.outer_model() as model:
            return mean_loss(model, batches, self.device, self._half)

    @contextmanager
    def outer_model(self) -> Iterator[torch.nn.Module]:
        """The model with the run's values, for sampling and export; in the training thread."""
        with nullcontext() if self._work is None else self._work.aside():
            yield self._model

    def export(self, folder: str) -> None:
        """Write the model as a transformers folder; with adapters: merged, and the adapter alone
        to `folder`/adapter."""
        with self.outer_model() as model:
            if hasattr(model, "merge_and_unload"):
                save_merged(model, Path(folder))
            else:
                save_model(model, Path(folder))

    # ── inside ───────────────────────────────────────────────────────────────────────────────
    def _drop_work(self) -> None:
        """The values are the run's again, and what was measured is forgotten."""
        if self._work is not None:
            self._work.close()
            self._work = None

    def _begin_file(self, log: SeedLog) -> None:
        self._file = GrowingBytes(log)
        self._leaves = []

    def _placed(self) -> tuple[StateGrid, _Place]:
        log, file = self._peer.log, self._file
        grid = self._origin.like(_described(len(file)))
        leaves = self._leaves
        for chunk in grid.chunks[len(leaves) :]:
            leaves.append(leaf_of(file.piece(chunk.start, chunk.stop)))
        digest = grid.digest(leaves)
        self._leaves = leaves[: len(file) // grid.chunk_bytes]
        return grid, _Place(digest, log.next, log.head)

    def _lengthen(self, chain: list[bytes], log: SeedLog) -> None:
        """decomfl: bring the chain of factors to where the log is."""
        if self.rules.method == "decomfl":
            for number in range(len(chain) - 1, log.next):
                factors = log.factors(number).astype("<f4").tobytes()
                chain.append(hashlib.sha256(chain[-1] + factors).digest())


def _described(size: int) -> tuple[TensorNote, ...]:
    return (TensorNote(LOG, np.dtype(np.uint8).str, (size,)),)


class _Told:
    """Says now and then how far it is, where it takes long."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._said_s = time.monotonic()

    def checked(self, records: int) -> None:
        if self._due():
            self._say(f"checking the seed log: {records:,} records")

    def replayed(self, done: int, rounds: int) -> None:
        if self._due():
            self._say(
                f"replaying the seed log: {done:,} of {rounds:,} rounds ({done / rounds:.0%})"
            )

    def _due(self) -> bool:
        now_s = time.monotonic()
        if now_s - self._said_s < PROGRESS_S:
            return False
        self._said_s = now_s
        return True
