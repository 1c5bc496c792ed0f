"""A zeroth-order method between the driver and the disk: whom it blames, and what comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from peer.checkpoint import CheckpointStore
from peer.exchange import Outcome, content_digest
from peer.learner import TrainerLearner
from peer.observe import events as ev
from peer.train.shared import SharedStream
from peer.train.zeroth import LOG, SignedWork, ZerothMethod
from peer.transfer import Snapshot
from protocols.messages import OUTCOME_DOMAIN, Contributor, OutcomeHeader
from protocols.records import sign
from protocols.types import Digest
from tests.peer.test_zo import Counting
from tests.protocols.samples import GROUP, RUN
from tests.train.tiny import batch
from tests.train.zo_tiny import build, reduce, signer, zo_manifest

MANIFEST = zo_manifest()
ME = signer(1).peer_id
AGGREGATOR = signer(2)


@asynccontextmanager
async def learner(
    folder: Path, heard: list[ev.Event] | None = None
) -> AsyncIterator[TrainerLearner]:
    made = TrainerLearner(
        ME, lambda: (build(MANIFEST, 1), Counting()), CheckpointStore(folder),
        (heard if heard is not None else []).append,
        run=RUN, batch_size=4, seed=0, threads=1, checkpoint_every=3,
    )  # fmt: skip
    await made.open()
    try:
        yield made
    finally:
        await made.close(save=False)


def outcome(it: TrainerLearner, payload: bytes, mine: SignedWork | None) -> Outcome:
    """Of the round that `it` is at, as its aggregator signs it."""
    inside = () if mine is None else (Contributor(ME, mine.weight, b""),)
    header = OutcomeHeader(
        RUN, GROUP, it.round, 1, 0, 0, 1, inside, content_digest([payload]), len(payload), 0.1,
        it.digest,
    )  # fmt: skip
    return Outcome(header, sign(AGGREGATOR, OUTCOME_DOMAIN, header), (payload,))


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)


async def goes_on(it: TrainerLearner) -> None:
    """A round of this peer alone."""

    def measure(method: ZerothMethod) -> None:
        method.step(batch(it.round))

    await it._trainer.run(measure)
    taken = await it.take(it.round)
    assert isinstance(taken.contribution, SignedWork)
    payload = reduce(it.method, [(1, taken.contribution)]).payload  # type: ignore[arg-type]
    assert await it.apply(it.round, [outcome(it, payload, taken.contribution)], None) is not None
    await it.after_round()


async def test_a_restart_goes_on_from_the_last_round(tmp_path: Path) -> None:
    async with learner(tmp_path) as it:
        for _ in range(5):
            await goes_on(it)
        last = it.round, it.digest, it.method.weights.digest()  # type: ignore[attr-defined]
    heard: list[ev.Event] = []
    async with learner(tmp_path, heard) as again:
        method = again.method
        assert isinstance(method, ZerothMethod)
        assert (again.round, again.digest, method.weights.digest()) == last
        (loaded,) = [event for event in heard if isinstance(event, ev.CheckpointLoaded)]
        assert loaded.replayed == 1
        await goes_on(again)
    # A checkpoint that the disk has damaged is passed over for the one before, with the reason.
    path = Path(loaded.path)
    damage(path)
    heard.clear()
    async with learner(tmp_path, heard) as again:
        assert again.round == 6
    (loaded,) = [event for event in heard if isinstance(event, ev.CheckpointLoaded)]
    assert loaded.skipped == [f"{path.name}: its content does not match its SHA-256"]


async def test_a_forged_record_is_its_aggregators_fault_and_moves_nobody(tmp_path: Path) -> None:
    heard: list[ev.Event] = []
    async with learner(tmp_path, heard) as it:
        await goes_on(it)
        before = it.digest
        facts = await it.apply(it.round, [outcome(it, b"\x93\x01\x90\x90", None)], None)
        assert facts is not None
        assert (facts.digest, it.digest, it.round) == (before, before, 2)
        (told,) = [event for event in heard if isinstance(event, ev.PeerRefused)]
        assert told == ev.PeerRefused(AGGREGATOR.peer_id, "record 1 of the seed log: 0 entries")
        await goes_on(it)
        assert it.digest != before


async def test_a_donors_damaged_log_is_the_donors_fault(tmp_path: Path) -> None:
    heard: list[ev.Event] = []
    async with learner(tmp_path / "donor") as donor, learner(tmp_path / "mine", heard) as it:
        for _ in range(2):
            await goes_on(donor)
        given = await donor.snapshot()
        raw = given.arrays[LOG].copy()
        raw[-40] ^= 1
        bad = Snapshot(2, given.digest, {LOG: raw}, donor=AGGREGATOR.peer_id)
        lie = Snapshot(2, Digest(bytes(32)), given.arrays, donor=AGGREGATOR.peer_id)
        before = it.digest
        for state in (bad, lie):
            assert not await it.load(state, True)
            assert (it.round, it.digest) == (0, before)
        reasons = [event.reason for event in heard if isinstance(event, ev.PeerRefused)]
        assert reasons == [
            "its state: record 1 of the seed log: not what was written",
            "its state: it is not what its digest says",
        ]
        assert await it.load(given, True, parted=0)
        assert it.digest == donor.digest
        assert not [event for event in heard if isinstance(event, ev.Reconciled)]


async def test_what_missed_an_outcome_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    async with learner(tmp_path) as it:
        monkeypatch.setattr(SharedStream, "drop", lambda _: dropped.append(it.round))
        other = build(MANIFEST, 3)
        other.step(batch(5))
        theirs = reduce(other, [(3, other.contribution())]).payload
        await it._trainer.run(lambda method: method.step(batch(1)))
        await it.take(0)
        # An outcome that changed nothing: our work still counts.
        assert await it.apply(0, [outcome(it, b"", None)], None) is not None
        assert dropped == []
        await it.take(1)
        assert await it.apply(1, [outcome(it, theirs, None)], None) is not None
        assert dropped == [2]
        facts = await it.apply(2, [outcome(it, b"", None)], None)
        assert facts is not None
        assert np.isclose(facts.included, 0.0)
