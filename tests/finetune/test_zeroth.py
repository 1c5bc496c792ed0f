"""Zeroth-order peers: many rounds, one set of values, whoever computes them with what."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peer.finetune import decomfl, kseed, mezo, scalars
from peer.finetune.seed_rules import SeedRules
from peer.finetune.seedfile import SeedFile
from peer.finetune.seedlog import SeedLog
from peer.finetune.tensors import Weights
from peer.finetune.zeroth import ZerothPeer
from protocols.types import PeerId
from tests.finetune.models import counting, next_token_loss, tiny_gpt, tiny_lora
from tests.finetune.seed_runs import rules, signer

Build = Callable[[], torch.nn.Module]


def rules_for(
    build: Build, method: str = "decomfl", master: str = "fp32", **more: Any
) -> SeedRules:
    base = Weights(build(), master).digest()
    given: dict[str, Any] = {
        "lr": 1e-2 if build is tiny_gpt else 0.5,
        "eps": 1e-3,
        "master": master,
    }
    return rules(method, base=base, **given | more)


class Company:
    """Several peers of one run in this process, each with data of its own."""

    def __init__(
        self,
        build: Build,
        run: SeedRules,
        count: int,
        compute: Sequence[torch.dtype | None] = (),
        samples: int = 2,
    ) -> None:
        self.samples = samples
        self.run = run
        self.peers = []
        for who in range(count):
            kind = compute[who] if compute else None
            base = Weights(build(), run.master).state()
            log = SeedLog(run)
            self.peers.append(ZerothPeer(build(), log, signer(who + 1), kind, base))
        self.rng = random.Random(5)

    def losses(self, who: int, number: int, count: int) -> list[Callable[[], torch.Tensor]]:
        model = self.peers[who].weights.model
        first = 1000 * who + 10 * (number % 7)

        def loss(seed: int) -> torch.Tensor:
            return next_token_loss(model, counting(seed, self.samples))

        return [partial(loss, first + k) for k in range(count)]

    def play(self, local_steps: int = 1, lying: int | None = None, ban: int | None = None) -> None:
        """One round: everybody measures, one makes the record, everybody checks and follows."""
        entries: dict[PeerId, bytes] = {}
        number = self.peers[0].number
        for who, peer in enumerate(self.peers):
            data = peer.measure(
                self.losses(who, number, local_steps), tokens=32 * (who + 1), rng=self.rng
            )
            assert data is not None
            if who == lying:
                worst = {i: 40.0 * (-1) ** i for i in range(self.run.scalars)}
                sent = scalars.quantise(worst)
                data = scalars.encode(self.run, signer(who + 1), peer.log.head, number, 1e9, sent)
            entries[signer(who + 1).peer_id] = data
        bans = [] if ban is None else [signer(ban + 1).peer_id]
        record = self.peers[0].log.make(entries, bans)
        for peer in self.peers:
            peer.log.append(signer(1).peer_id, record)
            peer.follow()

    def loss(self) -> float:
        with torch.no_grad():
            model = self.peers[0].weights.model
            return sum(float(next_token_loss(model, counting(s, 8))) for s in (7001, 7002)) / 2

    @property
    def digest(self) -> bytes:
        digests = {peer.digest() for peer in self.peers}
        assert len(digests) == 1
        return digests.pop()


@pytest.mark.parametrize("master", ["fp32", "bf16"])
@pytest.mark.parametrize("build", [tiny_gpt, tiny_lora])
def test_after_a_hundred_rounds_all_peers_and_a_late_joiner_hold_the_same_bits(
    build: Build, master: str
) -> None:
    """One peer calculates in float32, one in bfloat16: their losses differ, their values do not."""
    run = rules_for(build, master=master, perturbations=1, noise="rademacher")
    company = Company(build, run, 2, [torch.float32, torch.bfloat16])
    base = company.digest
    for number in range(100):
        company.play()
        if number % 25 == 0:
            assert company.digest != base
    whole = company.peers[0].log
    for log in (whole, SeedLog(run, whole.summary())):
        late = ZerothPeer(build(), log, signer(9))
        assert late.digest() == company.digest


@pytest.mark.parametrize("master", ["fp32", "bf16"])
def test_a_kseed_pool_does_the_same(master: str) -> None:
    run = rules_for(tiny_lora, "kseed", master=master, noise="gaussian")
    company = Company(tiny_lora, run, 2, [torch.float32, torch.bfloat16])
    for _ in range(10):
        company.play(local_steps=3)
    whole = company.peers[0].log
    for log in (whole, SeedLog(run, whole.summary())):
        late = ZerothPeer(tiny_lora(), log, signer(9))
        assert late.digest() == company.digest


def test_a_hundred_replayed_rounds_from_a_file(tmp_path: Path) -> None:
    """The log on disk is the checkpoint: written by one process's peer, replayed by another's."""
    run = rules_for(tiny_lora, perturbations=2)
    company = Company(tiny_lora, run, 1)
    with SeedFile.create(tmp_path / "seeds.log", SeedLog(run)) as file:
        for number in range(100):
            company.play()
            file.append(signer(1).peer_id, company.peers[0].log.record(number))
    with SeedFile.open(tmp_path / "seeds.log", run) as file:
        assert ZerothPeer(tiny_lora(), file.log, signer(9)).digest() == company.digest
        file.compact()
    with SeedFile.open(tmp_path / "seeds.log", run) as file:
        assert ZerothPeer(tiny_lora(), file.log, signer(9)).digest() == company.digest


@pytest.mark.parametrize(
    ("build", "rounds", "local_steps", "more"),
    [
        (tiny_gpt, 20, 1, {"lr": 1e-2, "perturbations": 8}),
        (tiny_gpt, 10, 8, {"lr": 3e-3, "method": "kseed", "pool": 4096}),
        (tiny_lora, 40, 1, {"lr": 0.1, "perturbations": 8, "eps": 1e-2}),
        (tiny_lora, 20, 8, {"lr": 0.03, "method": "kseed", "pool": 1024, "eps": 1e-2}),
    ],
    ids=["all-decomfl", "all-kseed", "lora-decomfl", "lora-kseed"],
)
def test_three_peers_lower_the_loss_on_data_that_none_of_them_has_seen(
    build: Build, rounds: int, local_steps: int, more: dict[str, Any]
) -> None:
    company = Company(build, rules_for(build, **more), 3, samples=8)
    before = company.loss()
    for _ in range(rounds):
        company.play(local_steps)
    assert company.loss() < before - 0.015


def test_a_decomfl_round_is_centralised_mezos_step_on_all_the_data() -> None:
    """Peers of equal weight find the slopes of the pooled batch, to the fifteen bits that travel;
    so training on them goes as well as on one machine that has all the data."""
    run = rules_for(tiny_gpt, perturbations=8, eps=1e-2)
    company = Company(tiny_gpt, run, 4)
    pooled = torch.cat([counting(1000 * who, 2) for who in range(4)])
    (seeds,) = decomfl.seeds_of(run, 0)
    model = tiny_gpt()
    alone = mezo.measure(
        Weights(model), lambda: next_token_loss(model, pooled), seeds, run.eps
    ).slopes
    entries = {}
    for who, peer in enumerate(company.peers):
        data = peer.measure(company.losses(who, 0, 1), tokens=1)
        assert data is not None
        entries[signer(who + 1).peer_id] = data
    log = company.peers[0].log
    log.append(signer(1).peer_id, log.make(entries))
    together = decomfl.reduce(run, log.readings(0))
    scale = max(abs(slope) for slope in alone)
    for index, slope in enumerate(alone):
        assert abs(together[index] - slope) < 1e-3 * scale


@pytest.mark.parametrize("method", ["decomfl", "kseed"])
def test_forward_differences_find_nearly_the_same_slopes(method: str) -> None:
    def found(form: str) -> dict[int, float]:
        run = rules_for(tiny_gpt, method, form=form, eps=2e-3)
        company = Company(tiny_gpt, run, 1, samples=4)
        (peer,) = company.peers
        data = peer.measure(company.losses(0, 0, 1), 1, random.Random(3))
        assert data is not None
        return dict(scalars.read(run, signer(1).peer_id, 0, data).scalars)

    central, forward = found("central"), found("forward")
    scale = max(map(abs, central.values()))
    assert central.keys() == forward.keys()
    assert all(abs(central[i] - forward[i]) < 0.15 * scale + 0.02 for i in central)


def test_odds_decide_which_directions_a_peer_draws() -> None:
    run = rules_for(tiny_lora, "kseed")
    company = Company(tiny_lora, run, 1)
    (peer,) = company.peers
    odds = [float(index in (3, 40)) for index in range(run.pool)]
    data = peer.measure(company.losses(0, 0, 12), 1, random.Random(3), odds)
    assert data is not None
    assert scalars.read(run, signer(1).peer_id, 0, data).scalars.keys() == {3, 40}


@pytest.mark.parametrize(("steps", "perturbations"), [(3, 2), (7, 8)])
def test_local_steps_leave_no_trace(steps: int, perturbations: int) -> None:
    """Also where there are so many that they go into the values for a while (7 x 8)."""
    run = rules_for(tiny_lora, steps=steps, perturbations=perturbations)
    company = Company(tiny_lora, run, 1)
    (peer,) = company.peers
    before = peer.digest()
    one = peer.measure(company.losses(0, 0, steps), 1)
    assert peer.digest() == before
    assert peer.measure(company.losses(0, 0, steps), 1) == one


def test_many_local_kseed_steps_leave_no_trace() -> None:
    run = rules_for(tiny_lora, "kseed")
    company = Company(tiny_lora, run, 1)
    company.play(local_steps=40)
    (peer,) = company.peers
    before = peer.digest()
    peer.measure(company.losses(0, 0, 40), 1, random.Random(1))
    assert peer.digest() == before


def test_local_steps_see_what_came_before_them() -> None:
    """The second step's slope is measured where the first one led."""
    run = rules_for(tiny_lora, steps=2, perturbations=1, lr=5.0)
    company = Company(tiny_lora, run, 1)
    (peer,) = company.peers
    data = peer.measure(company.losses(0, 0, 2), 1)
    assert data is not None
    peer.log.append(signer(1).peer_id, peer.log.make({signer(1).peer_id: data}))
    found = peer.log.readings(0)[0].scalars
    still = rules_for(tiny_lora, steps=2, perturbations=1, lr=1e-9)
    other = Company(tiny_lora, still, 1).peers[0]
    model = other.weights.model
    losses = [lambda s=s: next_token_loss(model, counting(s, 2)) for s in (0, 1)]
    data = other.measure(losses, 1)
    assert data is not None
    unmoved = scalars.read(still, signer(1).peer_id, 0, data).scalars
    assert found[0] == pytest.approx(unmoved[0], rel=1e-3)
    assert found[1] != pytest.approx(unmoved[1], rel=1e-2)


@pytest.mark.parametrize("method", ["decomfl", "kseed"])
@pytest.mark.parametrize("master", ["fp32", "bf16"])
def test_a_banned_liar_is_taken_out_to_the_last_bit(method: str, master: str) -> None:
    run, liar = rules_for(tiny_lora, method, master=master), signer(2).peer_id
    company = Company(tiny_lora, run, 3)
    for _ in range(6):
        company.play(lying=1)
    spoilt, log = company.digest, company.peers[0].log
    view = ZerothPeer(tiny_lora(), log.without(liar), signer(9))
    assert view.digest() != spoilt

    # The values of a run that never counted the liar's scalars, straight from the reducers.
    weights, sums = Weights(tiny_lora(), master), np.zeros(run.pool)
    base = weights.state()
    for number in range(log.next):
        rest = [reading for reading in log.readings(number) if reading.peer != liar]
        assert len(rest) == 2
        if method == "kseed":
            sums = kseed.add(run, sums, rest)
        else:
            factors = decomfl.factors_of(run, decomfl.reduce(run, rest))
            step = decomfl.step_of(run, number, factors)
            weights.apply(step, decomfl.dither_of(run, number))
    if method == "kseed":
        weights.rebuild(base, kseed.step_of(run, kseed.pool_of(run), sums))
    assert view.digest() == weights.digest()

    company.play(ban=1)  # a record says so: everybody goes back to the base and on
    assert company.peers[2].log.banned == {liar}
    assert company.digest != spoilt
    late = ZerothPeer(tiny_lora(), company.peers[2].log, signer(9))
    assert late.digest() == company.digest
    company.play()
    assert company.digest != late.digest()


def test_a_ban_needs_the_base() -> None:
    run = rules_for(tiny_lora)
    company = Company(tiny_lora, run, 1)
    company.play()
    (peer,) = company.peers
    bare = ZerothPeer(tiny_lora(), peer.log.without(), signer(9))
    digest = bare.digest()
    bare.log.append(signer(1).peer_id, bare.log.make({}, bans=[signer(1).peer_id]))
    with pytest.raises(ValueError, match="give the base"):
        bare.follow()
    assert bare.digest() == digest


def test_another_base_is_refused() -> None:
    run = rules_for(tiny_gpt)
    with pytest.raises(ValueError, match="load the run's base"):
        ZerothPeer(tiny_gpt(seed=1), SeedLog(run), signer(1))


def test_scalars_of_old_values_are_not_made() -> None:
    run = rules_for(tiny_lora)
    company = Company(tiny_lora, run, 1)
    (peer,) = company.peers
    data = peer.measure(company.losses(0, 0, 1), 1)
    assert data is not None
    peer.log.append(signer(1).peer_id, peer.log.make({signer(1).peer_id: data}))
    with pytest.raises(ValueError, match="follow the log first"):
        peer.measure(company.losses(0, 0, 1), 1)
    peer.follow()
    with pytest.raises(ValueError, match="2 batches for 1"):
        peer.measure(company.losses(0, 0, 2), 1)


def test_a_loss_that_is_no_number_or_too_steep_sends_nothing() -> None:
    run = rules_for(tiny_lora)
    company = Company(tiny_lora, run, 1)
    (peer,) = company.peers
    (loss,) = company.losses(0, 0, 1)
    before = peer.digest()
    assert peer.measure([lambda: loss() * float("nan")], 1) is None
    assert peer.measure([lambda: loss() * 1e12], 1) is None
    assert peer.digest() == before
