"""A zeroth-order run's method: entries in, records out, and a log that is the state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peer.errors import ManifestError
from peer.finetune import scalars, seedfile
from peer.finetune.seedfile import to_bytes
from peer.finetune.seedlog import SeedLog, SeedRecord, SeedSummary, SignedEntry
from peer.manifest import InnerSpec, Manifest, OuterSpec, ScheduleSpec
from peer.train import zeroth
from peer.train.zeroth import LOG, ZerothMethod
from protocols.identity import public_key_of
from protocols.schema import pack, unpack
from tests.finetune.models import PeakBytes
from tests.train.tiny import batch
from tests.train.zo_tiny import (
    Company,
    build,
    mine,
    reduce,
    signer,
    values,
    work,
    zo_manifest,
)


def array(raw: bytes) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    return {LOG: np.frombuffer(raw, np.uint8)}


def moved_on(method: ZerothMethod, manifest: Manifest) -> ZerothMethod:
    """Another peer with the same state."""
    late = build(manifest, 9)
    late.load_state(method.state())
    return late


# ── rounds ───────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"adapters": False, "master": "bf16", "noise": "rademacher", "eps": 1e-3},
        {"steps": 2, "reduction": "median"},
        {"estimator": "kseed", "pool": 64},
    ],
    ids=["adapters", "all in bf16", "median", "kseed"],
)
def test_peers_that_compute_in_float32_and_in_bfloat16_stay_equal_and_so_does_who_comes_late(
    spec: dict[str, Any],
) -> None:
    made = zo_manifest(**spec)
    company = Company(made, 3, [False, True, False])
    start = company.agree()
    company.play(3, steps=2)
    digest = company.agree()
    assert digest != start
    late = moved_on(company.methods[1], made)
    assert (late.digest(), late.weights.digest()) == (digest, company.methods[0].weights.digest())


def test_three_peers_lower_the_loss() -> None:
    company = Company(zo_manifest(lr=0.05, perturbations=8, adapters=False, eps=1e-3), 3)
    before = company.loss()
    company.play(8, steps=2)
    assert company.loss() < before - 0.03


@pytest.mark.parametrize(("steps", "perturbations"), [(1, 16), (4, 4)])
def test_a_decomfl_contribution_is_a_hundred_bytes_whatever_the_model(
    steps: int, perturbations: int
) -> None:
    sizes = []
    for adapters in (True, False):
        made = zo_manifest(adapters=adapters, steps=steps, perturbations=perturbations)
        (payload,) = work(build(made), 1, steps).encode(0, 1)
        sizes.append(len(payload))
    assert sizes == [100, 100]


def test_a_kseed_contribution_of_4096_seeds_is_at_most_16_400_bytes() -> None:
    made = zo_manifest(estimator="kseed", pool=4096)
    method = build(made)
    assert scalars.entry_bytes_max(method.rules) == 8772 <= 16400
    (payload,) = work(method, 1, 3).encode(0, 1)
    assert len(payload) == 4 + 512 + 2 * 3 + 64


@pytest.mark.parametrize(
    ("spec", "steps"),
    [({"steps": 7, "perturbations": 8}, 6), ({"estimator": "kseed", "pool": 64}, 35)],
    ids=["decomfl", "kseed"],
)
def test_a_peers_own_steps_are_gone_before_an_outcome_is_applied_and_while_others_look(
    spec: dict[str, Any], steps: int
) -> None:
    """So many local steps that they are in the values themselves for a while."""
    method = build(zo_manifest(**spec))
    before = values(method)
    loss = method.evaluate([batch(1)])
    for step in range(steps):
        method.step(batch(step))
    away = values(method)
    assert any((away[name] != tensor).any() for name, tensor in before.items())
    assert method.evaluate([batch(1)]) == loss
    assert all((values(method)[name] == tensor).all() for name, tensor in away.items())
    method.load_state(method.state())
    assert all((values(method)[name] == tensor).all() for name, tensor in before.items())


def test_whoever_has_time_for_more_passes_weighs_more_and_sends_their_mean() -> None:
    made = zo_manifest()
    one, other, both = (build(made, who) for who in (1, 2, 3))
    found = []
    for method, seeds in ((one, [1]), (other, [2]), (both, [1, 2])):
        for seed in seeds:
            method.step(batch(seed))
        part = method.contribution()
        assert part.weight == 64 * len(seeds)
        rules = method.rules
        found.append(scalars.read(rules, signer(1).peer_id, 0, part.entry).scalars)
    for index in range(2):
        mean = (found[0][index] + found[1][index]) / 2
        assert found[2][index] == pytest.approx(mean, rel=1e-3)


def test_a_pass_that_is_not_whole_is_not_sent_and_is_said_once() -> None:
    said: list[str] = []
    method = build(zo_manifest(steps=3), say=said.append)
    method.step(batch(1))
    for _ in range(2):
        assert method.contribution().weight == 0
        assert not method.idle
    assert method.owes()
    assert [text for text in said if "1 of the 3 local steps" in text] == said[1:]
    method.step(batch(2))
    method.step(batch(3))
    assert method.contribution().weight == 3 * 64


def test_it_stands_still_until_the_outcome_and_goes_on_if_that_changed_nothing() -> None:
    company = Company(zo_manifest(), 2)
    one, other = company.methods
    part = work(one, 1)
    assert (one.idle, one.owes()) == (True, True)
    one.apply([b""], mine())
    assert (one.idle, one.owes()) == (False, True)
    more = work(one, 2)
    assert more.weight == 2 * part.weight
    # A record without it: what it measured is worth nothing at the new state.
    record = reduce(other, [(2, work(other, 3))]).payload
    one.apply([record], mine(False))
    assert (one.idle, one.owes()) == (False, False)
    assert one.contribution().weight == 0


def test_who_only_looks_sends_nothing() -> None:
    assert work(build(zo_manifest(), None), 1).weight == 0


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "all"])
def test_a_step_takes_the_memory_of_running_the_model_and_of_one_of_its_tensors(
    adapters: bool,
) -> None:
    method = build(zo_manifest(adapters=adapters, perturbations=4, eps=1e-3))
    ids = batch(1)
    method.step(ids)  # finds out which modules run
    largest = max(tensor.nbytes for tensor in values(method).values())
    with PeakBytes() as running:
        method.evaluate([ids])
    with PeakBytes() as training:
        method.step(ids)
    assert training.peak <= running.peak + 2 * largest + 4096


# ── what an aggregator can't do ──────────────────────────────────────────────────────────
def test_an_aggregator_leaves_out_what_nobody_signed_for_this_state_and_says_whose() -> None:
    company = Company(zo_manifest(), 3)
    old = work(company.methods[2], 7)
    company.methods[2].apply([b""], mine())
    company.play()
    parts = [(who, work(method, who)) for who, method in enumerate(company.methods[:2], 1)]
    others = (4, parts[0][1])  # peer 4 sends what peer 1 has signed
    boast = zeroth.SignedWork(1e9, work(company.methods[2], 3).entry)
    reduced = reduce(company.methods[0], [*parts, (3, old), others])
    assert sorted(reason for _, reason in reduced.refused) == [
        "entry of round 1: it is for another round (...0)",
        "entry of round 1: wrong signature",
    ]
    record = unpack(SeedRecord, reduced.payload)
    assert {entry.author for entry in record.entries} == {
        public_key_of(signer(who).peer_id) for who in (1, 2)
    }
    (refused,) = reduce(company.methods[0], [(3, boast)]).refused
    assert refused[1] == "weighs 64 and is said to weigh 1e+09"


def test_a_reducer_takes_no_bytes_of_another_size() -> None:
    reducer = build(zo_manifest()).reducer()
    for size in (0, 71, 73):
        with pytest.raises(ValueError, match=f"an entry of {size} bytes, not 72 to 72"):
            reducer.check(0, bytes(size))


def forged(record: bytes) -> bytes:
    """With another scalar in the first entry."""
    read = unpack(SeedRecord, record)
    first = read.entries[0]
    entry = bytearray(first.entry)
    entry[4] ^= 1
    entries = (SignedEntry(first.author, bytes(entry)), *read.entries[1:])
    return pack(SeedRecord(read.number, entries, ()))


def test_a_forged_record_changes_nothing_and_names_the_entry() -> None:
    company = Company(zo_manifest(), 2)
    company.play()
    one, other = company.methods
    parts = [(1, work(one, 1)), (2, work(other, 2))]
    record = reduce(one, parts).payload
    read = unpack(SeedRecord, record)
    ban = public_key_of(signer(2).peer_id)
    author = min(signer(1).peer_id, signer(2).peer_id, key=public_key_of)
    for bad, reason in (
        (forged(record), f"record 1 of the seed log: {author}'s entry of round 1: wrong signature"),
        (pack(SeedRecord(2, read.entries, ())), "record 1 of the seed log: got number 2, a gap"),
        (pack(SeedRecord(1, read.entries, (ban,))), "a ban, which nobody may say here"),
        (pack(SeedRecord(1, (), ())), "record 1 of the seed log: 0 entries"),
        (b"\xc1", "record 1 of the seed log:"),
    ):
        before = company.agree()
        for method in company.methods:
            method.apply([bad], mine())
            assert reason in method.refusal
        assert company.agree() == before
    one.apply([record], mine())
    other.apply([record], mine())
    assert (one.refusal, one.refused_units) == ("", 5)
    company.agree()


# ── states ───────────────────────────────────────────────────────────────────────────────
def test_a_damaged_log_is_refused_with_the_reason_and_nothing_changes() -> None:
    made = zo_manifest()
    company = Company(made, 2)
    company.play(3)
    log = company.methods[0]._peer.log
    raw = to_bytes(log)
    flipped = bytearray(raw)
    flipped[-40] ^= 1
    gap, wrong = SeedLog(log.rules), SeedLog(log.rules)
    gap.take(log.record(0), unpack(SeedRecord, log.record(0)))
    gap.take(log.record(2), unpack(SeedRecord, log.record(2)))
    for number in range(3):
        record = forged(log.record(1)) if number == 1 else log.record(number)
        wrong.take(record, unpack(SeedRecord, record))
    author = min((signer(n).peer_id for n in (1, 2)), key=public_key_of)
    late = build(made, 9)
    before = late.digest()
    other = build(zo_manifest(lr=0.07), 9)
    for bad, reason in (
        (bytes(flipped), "record 2 of the seed log: not what was written"),
        (raw[:-7], "record 2 of the seed log: not what was written"),
        (to_bytes(gap), "record 1 of the seed log: got number 2, a gap"),
        (to_bytes(wrong), f"record 1 of the seed log: {author}'s entry of round 1: wrong sig"),
        (raw[:30], "the seed log: not what was written"),
        (b"MURMSLG9", "the seed log: no seed log at all"),
        (to_bytes(other._peer.log), "the seed log: of another run, or another base"),
    ):
        with pytest.raises(ValueError, match=reason):
            late.load_state(array(bad))
        assert late.digest() == before
    with pytest.raises(ValueError, match="expected a seed log"):
        late.load_state({"theta": np.zeros(3, np.float32)})
    late.load_state(array(raw))
    assert late.digest() == company.agree()


@pytest.mark.parametrize("spec", [{}, {"estimator": "kseed", "pool": 64}], ids=["decomfl", "kseed"])
def test_a_long_log_is_summed_up_by_everybody_in_the_same_round(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = zo_manifest(**spec)
    company, whole = Company(made, 2), Company(made, 2)
    for rounds in (company, whole):
        for method in rounds.methods:
            method._rng.seed(5)
    size = 0
    for _ in range(3):
        record = whole.play()
        size = size or 2 * len(record) - 1
        with monkeypatch.context() as patch:
            patch.setattr(zeroth, "LOG_BYTES_MAX", size)
            company.play()
        company.agree()
    one, long = company.methods[0], whole.methods[0]
    assert (one._peer.log.first, long._peer.log.first) == (2, 0)
    assert one._place.head == long._place.head
    assert one.digest() != long.digest()
    assert one.weights.digest() == long.weights.digest()
    late, base = moved_on(one, made), build(made, 1)
    start = base.weights.digest()
    assert (late.digest(), late.weights.digest()) == (one.digest(), one.weights.digest())
    # Who was there before goes back, or on from where it is, as the log says.
    late.load_state(base.state())
    assert late.weights.digest() == start
    late.load_state(long.state())
    late.load_state(one.state())
    assert late.weights.digest() == one.weights.digest()


def test_a_summary_of_other_numbers_has_another_digest() -> None:
    """So a donor that lies about them is found out by what everybody else says."""
    made = zo_manifest()
    company = Company(made, 1)
    company.play(2)
    log = company.methods[0]._peer.log
    true = log.summary()
    lie = SeedSummary(
        true.genesis, true.head, true.rounds, true.banned, bytes(4) + true.numbers[4:]
    )
    honest, deceived = build(made, 8), build(made, 9)
    honest.load_state(array(to_bytes(SeedLog(log.rules, true))))
    deceived.load_state(array(to_bytes(SeedLog(log.rules, lie))))
    assert honest.weights.digest() == company.methods[0].weights.digest()
    assert deceived._place.head == honest._place.head
    assert deceived.digest() != honest.digest()


def test_another_halfs_log_takes_the_place_of_ours() -> None:
    made = zo_manifest()
    one, other = Company(made, 1), Company(made, 1)
    one.play(2)
    other.rounds = 7
    other.play(3)
    (ours,), (theirs,) = one.methods, other.methods
    ours.reconcile(theirs.state(), 100.0, 2)
    assert (ours.digest(), ours.weights.digest()) == (theirs.digest(), theirs.weights.digest())


def test_a_long_replay_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made, said = zo_manifest(), list[str]()
    company = Company(made, 1)
    company.play(2)
    monkeypatch.setattr(zeroth, "PROGRESS_S", 0.0)
    build(made, 9, say=said.append).load_state(company.methods[0].state())
    assert "checking the seed log: 2 records" in said
    assert "replaying the seed log: 1 of 2 rounds (50%)" in said


def test_the_base_is_kept_on_the_disk_and_nothing_stays_there(tmp_path: Path) -> None:
    build(zo_manifest(estimator="kseed", pool=64, adapters=False), 1, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "all"])
def test_the_model_is_exported_as_a_folder(tmp_path: Path, adapters: bool) -> None:
    from peer.train.models import load_folder

    method = build(zo_manifest(adapters=adapters, lr=0.5))
    for _ in range(2):
        method.apply([reduce(method, [(1, work(method, 1))]).payload], mine())
    method.export(str(tmp_path / "out"))
    model = load_folder(tmp_path / "out").eval()
    ids = batch(3)
    with method.outer_model() as mine_model, torch.no_grad():
        ours = mine_model(input_ids=ids).logits
        theirs = model(input_ids=ids).logits
    assert float((theirs - ours).abs().max()) < 1e-4
    assert (tmp_path / "out/adapter").is_dir() == adapters


# ── the manifest ─────────────────────────────────────────────────────────────────────────
def test_a_seed_files_bytes_are_the_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    company = Company(zo_manifest(), 1)
    company.play(2)
    (method,) = company.methods
    log = method._peer.log
    with seedfile.SeedFile.create(tmp_path / "seeds.log", log):
        written = (tmp_path / "seeds.log").read_bytes()
    state = method.state()
    assert state[LOG].tobytes() == written
    assert method.grid.digest(method.grid.leaves(state)) == method.digest()
    monkeypatch.setattr(method._origin, "chunk_bytes", 256)  # so that it has several
    for _ in range(3):
        company.play()
        assert method.grid.digest(method.grid.leaves(method.state())) == method.digest()
    assert method.grid.count > 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zeroth": {"pool": 12}}, "zeroth.pool: must be a multiple of 8"),
        ({"zeroth": {"eps": 0.0}}, "zeroth.eps: must be > 0"),
        ({"zeroth": {"steps": 512, "perturbations": 4}}, "zeroth.steps: must be at most 1024"),
        (
            {"zeroth": {"estimator": "kseed", "reduction": "median"}},
            "zeroth.reduction: must be mean for kseed",
        ),
        ({"schedule": ScheduleSpec(gossip_every=4)}, "schedule.gossip_every: must be 0 for zo"),
        (
            {"schedule": ScheduleSpec(gossip_every=0, fragments=2)},
            "schedule.fragments: must be 1 for zo",
        ),
        ({"outer": OuterSpec(asynchronous=True)}, "outer.asynchronous: must be false for zo"),
        ({"inner": InnerSpec(ends="2030-01-01T00:00:00Z")}, "inner.ends: must be empty for zo"),
    ],
)
def test_what_makes_no_zeroth_order_run_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ManifestError, match=words.replace(".", r"\.")):
        dataclasses.replace(zo_manifest(**change.pop("zeroth", {})), **change)
