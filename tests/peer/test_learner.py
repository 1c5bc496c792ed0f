"""Training and the disk as the driver sees them: whose state a round may be applied to, and what
is on the disk after a donor's state took the place of ours."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from peer.checkpoint import CheckpointStore
from peer.exchange import Outcome
from peer.learner import TrainerLearner
from protocols.messages import OUTCOME_DOMAIN, OutcomeHeader
from protocols.records import sign
from protocols.types import Digest
from tests.protocols.samples import GROUP, RUN, peer, signer
from tests.toys import CODEC, ToyData, ToyMethod

SIZE = 64


@asynccontextmanager
async def learner(folder: Path) -> AsyncIterator[TrainerLearner]:
    made = TrainerLearner(
        peer(0), lambda: (ToyMethod(SIZE, 0), ToyData()), CheckpointStore(folder), lambda _: None,
        run=RUN, batch_size=1, seed=0, threads=None, checkpoint_every=100,
    )  # fmt: skip
    await made.open()
    try:
        yield made
    finally:
        await made.close(save=False)


def outcome(number: int, step: float, base: Digest) -> Outcome:
    units = tuple(CODEC.encode_many(np.full(SIZE, step, np.float32)))
    content = hashlib.sha256(b"".join(units)).digest()
    header = OutcomeHeader(
        RUN, GROUP, number, 1, 0, 0, 1, (), content, sum(map(len, units)), 0.1, base
    )
    return Outcome(header, sign(signer(1), OUTCOME_DOMAIN, header), units)


async def goes_on(it: TrainerLearner, step: float) -> bool:
    done = await it.apply(it.round, [outcome(it.round, step, it.digest)], None)
    await it.after_round()
    return done is not None


async def test_a_round_of_another_history_is_not_applied_though_its_number_is_right(
    tmp_path: Path,
) -> None:
    async with learner(tmp_path) as it:
        assert await goes_on(it, 0.5)
        theirs = Digest(b"another state".ljust(32))
        before = it.digest
        assert await it.apply(1, [outcome(1, 0.25, theirs)], None) is None
        assert (it.round, it.digest) == (1, before)
        assert await goes_on(it, 0.25)


async def test_rounds_after_a_donors_state_are_not_added_to_what_was_on_the_disk(
    tmp_path: Path,
) -> None:
    async with learner(tmp_path / "donor") as donor, learner(tmp_path / "mine") as mine:
        assert await goes_on(donor, 0.75)
        assert await goes_on(donor, 0.5)
        for step in (0.125, 0.25, 0.0625):
            assert await goes_on(mine, step)
        assert mine.round == 3
        assert await mine.load(await donor.snapshot(), True)
        assert (mine.round, mine.digest) == (2, donor.digest)
        # A round is applied before the new state is on the disk.
        assert await mine.apply(2, [outcome(2, 0.5, mine.digest)], None) is not None
        await mine.after_load()
        assert await goes_on(mine, 0.125)
        last = mine.round, mine.digest
    async with learner(tmp_path / "mine") as again:
        assert (again.round, again.digest) == last


async def test_who_dies_with_a_donors_state_not_yet_on_the_disk_finds_its_own_again(
    tmp_path: Path,
) -> None:
    async with learner(tmp_path / "donor") as donor, learner(tmp_path / "mine") as mine:
        assert await goes_on(donor, 0.75)
        for step in (0.125, 0.25):
            assert await goes_on(mine, step)
        own = mine.round, mine.digest
        assert await mine.load(await donor.snapshot(), True)
        assert await mine.apply(1, [outcome(1, 0.5, mine.digest)], None) is not None
    async with learner(tmp_path / "mine") as again:
        assert (again.round, again.digest) == own
