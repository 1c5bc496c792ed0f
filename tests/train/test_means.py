"""What a peer of a hybrid run is found able to do, and what it says about that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peer.config import PeerConfig
from peer.errors import UsageError
from peer.manifest import KINDS, ModelSpec
from peer.peer import build_run
from peer.train import build_method
from peer.train.adapted import layers_of
from peer.train.hybrid import HybridMethod
from peer.train.means import DIRECTIONS, Job, Machine, Means, Wish, decide, job_of, look_around
from peer.train.models import build_model
from tests.finetune.models import PeakBytes
from tests.train.hybrid_tiny import LORA4, ZO, hybrid_manifest, peer
from tests.train.tiny import manifest

GIB = 2**30
JOB = Job(  # like a model of 124 million parameters, all its linear layers adapted
    parameters=124_000_000, layers=[(768, 768), (2304, 768), (3072, 768), (768, 3072)] * 12,
    blocks=12, hidden=768, heads=12, vocabulary=50257, batch=4, length=512, rank=16, bits=3.1,
    link_s=2.5, round_s=5.0,
)  # fmt: skip
STRONG = Machine(free_bytes=32 * GIB, flops=1e13)


def auto(machine: Machine, admit: tuple[str, ...] = KINDS, job: Job = JOB) -> Means:
    return decide(Wish(), job, machine, admit)


def test_a_strong_machine_takes_the_runs_rank_and_says_what_it_takes() -> None:
    means = auto(STRONG)
    assert (means.kind, means.rank) == ("lora", 16)
    assert "gradients need about" in means.why
    assert "of 34.4 GB free" in means.why


def test_a_thin_line_takes_a_lower_rank() -> None:
    means = auto(replace(STRONG, upload_bps=1e6))
    assert means.kind == "lora"
    assert 1 <= means.rank < 16
    assert JOB.upload_s(means.rank, 1e6) <= JOB.link_s < JOB.upload_s(2 * means.rank, 1e6)
    assert "to upload takes" in means.why
    assert auto(replace(STRONG, upload_bps=1e9)).rank == 16


def test_who_has_no_memory_for_gradients_goes_without() -> None:
    need = JOB.bytes_first_order(JOB.values(1))
    machine = Machine(free_bytes=int(need / 0.8) - 10**6, flops=1e11)
    means = auto(machine)
    assert means.kind == "zo"
    assert 1 <= means.perturbations <= DIRECTIONS
    assert "gradients would need about" in means.why
    assert JOB.bytes_zeroth_order() < 0.5 * need
    assert auto(replace(machine, free_bytes=int(need / 0.8) + 10**6)).kind == "lora"


@pytest.mark.parametrize("means", [LORA4, ZO], ids=["lora", "zo"])
def test_the_memory_that_is_estimated_is_enough_and_not_far_too_much(means: Means) -> None:
    run = hybrid_manifest()
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_key_value_heads": 2}
    run = replace(run, model=ModelSpec(config=run.model.config | shape))
    model = build_model(run, None)
    shapes = [layer.shape for layer in layers_of(model, ()).values()]
    job = replace(job_of(run, model, shapes, 3.1), batch=8, length=64)
    method = peer(means, run)
    ids = torch.arange(8 * 64).reshape(8, 64) % 257
    method.step(ids)
    with PeakBytes() as used:
        method.step(ids)
    blocks = job.blocks if means is LORA4 else 1
    estimated = blocks * job.activation_bytes + job.logit_bytes
    assert used.peak <= estimated <= 5 * used.peak


def test_a_slow_machine_tries_fewer_directions() -> None:
    tried = [JOB.directions(flops) for flops in (1e15, 3e12, 1e9)]
    assert tried == sorted(tried, reverse=True)
    assert (tried[0], tried[-1]) == (DIRECTIONS, 1)


def test_what_the_run_does_not_admit_is_not_chosen() -> None:
    assert auto(STRONG, ("seeds",)).kind == "zo"
    assert auto(STRONG, ("dense",)).kind == "full"
    tight = auto(Machine(free_bytes=1, flops=1e12), ("dense", "lowrank"))
    assert (tight.kind, tight.rank) == ("lora", 1)
    assert "it may not fit" in tight.why
    for text, admit in (("zo", ("lowrank",)), ("lora:2", ("seeds",)), ("full:2", ("dense",))):
        with pytest.raises(UsageError, match=f"admits {admit[0]} only"):
            decide(Wish.parse(text), JOB, STRONG, admit)


def test_the_owners_wish_is_done() -> None:
    for text, means in (
        ("lora:3", ("lora", 3, 0)), ("lora", ("lora", 16, 0)), ("zo:12", ("zo", 2, 12)),
        ("zo", ("zo", 2, DIRECTIONS)), ("full", ("full", 0, 0)), ("full:2", ("full", 2, 0)),
    ):  # fmt: skip
        made = decide(Wish.parse(text), JOB, replace(STRONG, flops=1e15), KINDS)
        assert (made.kind, made.rank, made.perturbations) == means
        assert made.why == "as its owner wishes"
    with pytest.raises(UsageError, match="the run's rank is 16"):
        decide(Wish.parse("lora:17"), JOB, STRONG, KINDS)


@pytest.mark.parametrize(
    "text", ["", "lora:0", "lora:", "lora:-1", "zo:65", "zo:1.5", "full:x", "auto:1", "LORA", "x"]
)
def test_a_wish_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--method"):
        Wish.parse(text)


def test_a_wish_in_a_run_where_all_train_alike_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this run is pretrain, where all peers train alike"):
        build_run(manifest(), tmp_path, PeerConfig(method="lora:2", device="cpu"))
    with pytest.raises(UsageError, match="--method"):
        PeerConfig(method="lora:x")


def test_a_look_at_this_machine_decides_something_that_trains() -> None:
    machine = look_around(torch.device("cpu"), None)
    assert machine.free_bytes > 10**6
    assert machine.flops > 10**6
    method = build_method(hybrid_manifest(), device="cpu", threads=1, wish=Wish())
    assert isinstance(method, HybridMethod)
    assert method.means.kind == "lora"
    assert method.facts()["why"].startswith("gradients need about")
