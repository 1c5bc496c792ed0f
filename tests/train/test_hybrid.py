"""Peers of every kind train one run: what comes out is the exact sum of what went in."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from peer.errors import ManifestError
from peer.finetune.changes import Expanded, LowRank
from peer.finetune.coded import KINDS, SEGMENTS_MAX, decode, encode_lowrank
from peer.train import build_method
from peer.train.flat import FrozenWork
from peer.train.hybrid import STATE, HybridMethod
from peer.train.lora import PARTS_MAX
from peer.train.means import Means
from tensorcodecs import DecodeError, get_codec
from tests.train.hybrid_tiny import (
    FULL,
    LORA2,
    LORA4,
    RANK,
    ZO,
    close,
    hybrid_manifest,
    inside,
    peer,
)
from tests.train.tiny import CONFIG, batch, manifest

Array = npt.NDArray[Any]
KINDS_OF_PEERS = {"lora4": LORA4, "lora2": LORA2, "zo": ZO, "full": FULL}
each_kind = pytest.mark.parametrize("means", KINDS_OF_PEERS.values(), ids=KINDS_OF_PEERS)


def train(method: HybridMethod, steps: int = 2, seed: int = 0) -> HybridMethod:
    for step in range(steps):
        method.step(batch(100 * seed + step % 4))
    return method


def state(method: HybridMethod) -> list[Array]:
    """The outer change of each layer, (m, n)."""
    pairs = [a.split(h.values) for a, h in zip(method._adapters, method._held, strict=True)]
    return [B.astype(np.float64) @ A.astype(np.float64) for A, B in pairs]


def total(method: HybridMethod) -> list[Array]:
    """What the peer's model has on top of its base, layer by layer: all that was learned."""
    found = []
    for layer, change in zip(method._layers, state(method), strict=True):
        for A, B in layer.kept:
            change = change + (B.double() @ A.double()).numpy()
        if layer.own == "values":
            change = change + layer.D.detach().double().numpy()
        else:
            product = layer.B.detach().double() @ layer.A.detach().double()
            change = change + layer.scale * product.numpy()
        found.append(change)
    return found


def changes(method: HybridMethod, part: FrozenWork) -> list[Array]:
    """What a contribution says."""
    found = []
    for unit, payload in enumerate(part.encode(0, method.units)):
        change = decode(method._layers[unit].layer, payload, RANK, tuple(KINDS)).change
        made = change.made() if isinstance(change, Expanded) else change
        found.append(made.dense())
    return found


def near(ones: list[Array], others: list[Array], rel: float = 1e-5) -> bool:
    return all(
        np.linalg.norm(one - other) <= rel * (np.linalg.norm(other) + 1e-3)
        for one, other in zip(ones, others, strict=True)
    )


def test_the_outcome_is_the_state_and_the_weighted_mean_at_the_runs_rank() -> None:
    peers = [peer(means, seed=i) for i, means in enumerate(KINDS_OF_PEERS.values())]
    for round_ in range(2):
        parts = [train(p, 2, 10 * i + round_).contribution() for i, p in enumerate(peers)]
        before = state(peers[0])
        sent = [changes(p, part) for p, part in zip(peers, parts, strict=True)]
        outcome, refused = close(peers[1], parts)
        assert not refused
        for p in peers:
            p.apply(outcome, inside(p))
        whole = sum(part.weight for part in parts)
        for unit, after in enumerate(state(peers[0])):
            exact = before[unit] + sum(
                part.weight / whole * one[unit] for part, one in zip(parts, sent, strict=True)
            )
            u, s, vt = np.linalg.svd(exact)
            best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
            assert np.linalg.norm(after - best) <= 1e-5 * np.linalg.norm(exact)
            assert peers[0].tails[unit] == pytest.approx(np.linalg.norm(s[RANK:]), rel=1e-5)
        assert len({p.digest() for p in peers}) == 1


def test_a_run_against_drift_spreads_the_mean_change_and_takes_more_of_it() -> None:
    run = hybrid_manifest(spectrum=0.5, step=1.5)
    peers = [peer(LORA2, run, seed=i) for i in range(3)]
    parts = [train(p, 2, i).contribution() for i, p in enumerate(peers)]
    sent = [changes(p, part) for p, part in zip(peers, parts, strict=True)]
    outcome, refused = close(peers[0], parts)
    assert not refused
    whole = sum(part.weight for part in parts)
    for p in peers:
        p.apply(outcome, inside(p))
    for unit, after in enumerate(state(peers[0])):  # it began at zero
        exact = sum(part.weight / whole * one[unit] for part, one in zip(parts, sent, strict=True))
        u, s, vt = np.linalg.svd(exact)
        s = np.where(s > 1e-7 * s[0], s, 0.0)
        raised = np.sqrt(s) * np.linalg.norm(s) / np.linalg.norm(np.sqrt(s))
        best = 1.5 * (u[:, :RANK] * raised[:RANK]) @ vt[:RANK]
        assert np.linalg.norm(after - best) <= 1e-4 * np.linalg.norm(best)
    assert len({p.digest() for p in peers}) == 1


def test_peers_of_every_kind_stay_equal_to_the_last_bit_and_learn() -> None:
    run = hybrid_manifest("q4")
    peers = [peer(means, run, i) for i, means in enumerate(KINDS_OF_PEERS.values())]
    held = [batch(500)]
    start = peers[0].evaluate(held)
    for round_ in range(5):
        parts = [train(p, 4, 10 * i + round_).contribution() for i, p in enumerate(peers)]
        outcome, refused = close(peers[round_ % 4], parts)
        assert not refused
        for p in peers:
            p.apply(outcome, inside(p))
        assert len({p.digest() for p in peers}) == 1
        states = [p.state()[STATE] for p in peers]
        assert all((s == states[0]).all() for s in states)
    losses = {p.evaluate(held) for p in peers}
    assert max(losses) < start - 0.15
    late = peer(FULL, run)
    late.load_state(peers[0].state())
    assert late.digest() == peers[0].digest()
    assert late.evaluate(held) in losses


def test_a_peer_without_gradients_learns_by_itself() -> None:
    alone = peer(Means("zo", 2, 16), hybrid_manifest(), seed=3)
    seen = [batch(step) for step in range(4)]
    start = alone.evaluate(seen)
    for _ in range(3):
        outcome, _ = close(alone, [train(alone, 8).contribution()])
        alone.apply(outcome, inside(alone))
    assert alone.evaluate(seen) < start - 0.02


@each_kind
def test_what_is_inside_is_taken_away_and_what_came_since_stays(means: Means) -> None:
    method = train(peer(means))
    part = method.contribution()
    frozen = total(method)
    sent = changes(method, part)
    assert near(sent, frozen), "the state is still nothing, so all there is was sent"
    train(method, 2, 7)
    since = [a - b for a, b in zip(total(method), frozen, strict=True)]
    assert max(np.abs(change).max() for change in since) > 1e-4
    outcome, _ = close(method, [part])
    method.apply(outcome, inside(method))
    assert near(total(method), [a + b for a, b in zip(state(method), since, strict=True)])
    assert not any(layer.kept for layer in method._layers)


@each_kind
def test_what_missed_its_exchange_stays_in_the_model_and_goes_with_the_next(means: Means) -> None:
    method, other = train(peer(means)), train(peer(LORA4), 2, 5)
    missed = method.contribution().weight
    before, old = total(method), state(method)
    outcome, _ = close(other, [other.contribution()])
    method.apply(outcome, inside(method, mine=False))
    moved = [a - b for a, b in zip(state(method), old, strict=True)]
    assert near(total(method), [a + b for a, b in zip(before, moved, strict=True)])
    part = method.contribution()
    assert part.weight == pytest.approx(missed / 1.5), "staleness 0.5, one exchange missed"
    assert near(changes(method, part), before)
    train(method, 1, 9)
    again = method.contribution()
    assert again.weight > 0
    local = [a - b for a, b in zip(total(method), state(method), strict=True)]
    assert near(changes(method, again), local)


@each_kind
def test_some_layers_may_be_inside_and_others_not(means: Means) -> None:
    method = train(peer(means))
    part = method.contribution()
    frozen = changes(method, part)
    outcome, _ = close(method, [part])
    outcome[1] = b""
    mine = inside(method)
    mine[1] = False
    method.apply(outcome, mine)
    later = changes(method, method.contribution())
    assert near(later[1:2], frozen[1:2])
    assert max(np.abs(later[unit]).max() for unit in range(method.units) if unit != 1) < 1e-5


@each_kind
def test_after_a_partition_the_next_contribution_carries_what_lies_between(means: Means) -> None:
    ours, theirs = train(peer(means), 3), train(peer(LORA4), 3, 5)
    for half in (ours, theirs):
        outcome, _ = close(half, [half.contribution()])
        half.apply(outcome, inside(half))
    train(ours, 1, 7)  # and work that no outcome contains
    before, old = total(ours), state(ours)
    ours.reconcile(theirs.state(), 64.0, 1)
    assert ours.digest() == theirs.digest()
    cut = [
        float(np.linalg.norm(np.linalg.svd(a - b)[1][RANK:]))
        for a, b in zip(old, state(theirs), strict=True)
    ]
    gaps = [float(np.linalg.norm(a - b)) for a, b in zip(total(ours), before, strict=True)]
    assert gaps == pytest.approx(cut, rel=1e-3, abs=1e-4), "only what rank R can't hold is gone"
    assert ours.facts()["lost"] == pytest.approx(np.linalg.norm(cut), rel=1e-3)
    local = [a - b for a, b in zip(total(ours), state(ours), strict=True)]
    part = ours.contribution()
    assert part.weight == 64 / 2, "an average round of two, and in full, whoever sends it"
    assert near(
        changes(ours, part), local if means is FULL else [_at_rank(one) for one in local], 1e-3
    )
    outcome, refused = close(theirs, [part])
    assert not refused
    ours.apply(outcome, inside(ours))
    assert not any(layer.kept for layer in ours._layers)
    assert max(np.abs(change).max() for change in changes(ours, ours.contribution())) < 1e-5
    assert train(ours, 1).contribution().weight == pytest.approx(64 * ours._share)


def test_where_factors_are_not_admitted_a_partition_costs_a_zeroth_order_peer_its_half() -> None:
    run = hybrid_manifest(admit=("seeds",))
    ours, theirs = train(peer(ZO, run, 1)), train(peer(ZO, run, 2))
    for half in (ours, theirs):
        outcome, _ = close(half, [half.contribution()])
        half.apply(outcome, inside(half))
    ours.reconcile(theirs.state(), 64.0, 1)
    assert ours.facts()["lost"] > 0
    assert near(total(ours), state(theirs))
    close(theirs, [train(ours).contribution()])


def _at_rank(change: Array) -> Array:
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    made: Array = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
    return made


def test_work_of_too_many_missed_rounds_is_given_up_and_counted() -> None:
    method = peer(ZO)
    for round_ in range(SEGMENTS_MAX + 1):
        train(method, 1, round_)
        assert method.facts()["dropped_rounds"] == 0
        part = method.contribution()
    assert method.facts()["dropped_rounds"] == 1
    local = [a - b for a, b in zip(total(method), state(method), strict=True)]
    assert near(changes(method, part), local)
    assert max(map(len, part.encode(0, method.units))) < 400


def test_a_sent_product_leaves_the_rest_for_the_next_rounds() -> None:
    method = train(peer(Means("full", 1)))
    whole = total(method)
    part = method.contribution()
    for one, all_of_it in zip(changes(method, part), whole, strict=True):
        sigma = np.linalg.svd(all_of_it)[1]
        rest = np.linalg.norm(all_of_it - one)
        assert rest == pytest.approx(np.linalg.norm(sigma[1:]), rel=1e-4)
    outcome, _ = close(method, [part])
    method.apply(outcome, inside(method))
    assert near(total(method), whole)


def test_a_zeroth_order_peer_counts_by_its_directions() -> None:
    first, zeroth = train(peer(LORA2)), train(peer(ZO))
    assert first.contribution().weight == 128.0  # two steps of 64 tokens, nobody missed a round
    assert zeroth.contribution().weight == pytest.approx(128 * 8 / 108)
    assert not train(peer(LORA2), 0).owes()


# ── the state that a mean is made on ─────────────────────────────────────────────────────
def test_a_change_of_another_state_is_refused_in_its_senders_name() -> None:
    here, there = train(peer(LORA4)), train(peer(LORA2), 2, 3)
    outcome, _ = close(here, [here.contribution()])
    late = there.contribution()
    here.apply(outcome, inside(here))
    train(here)
    _, refused = close(here, [late, here.contribution()])
    assert [index for index, _ in refused] == [0] * here.units
    assert "a change of another state" in refused[0][1]


def test_where_all_are_elsewhere_nothing_changes_and_nobody_is_to_blame() -> None:
    here, there = train(peer(LORA4)), train(peer(LORA2), 2, 3)
    part = there.contribution()
    outcome, _ = close(here, [here.contribution()])
    here.apply(outcome, inside(here))
    outcome, refused = close(here, [part])
    assert not refused
    assert outcome == [b""] * here.units
    before = here.digest()
    here.apply(outcome, inside(here))
    assert here.digest() == before


def test_a_mean_is_made_on_one_state_while_another_takes_its_place() -> None:
    here = train(peer(LORA4))
    part = here.contribution()
    (payload,) = part.encode(0, 1)
    reducer = here.reducer()
    expected = reducer.reduce(0, [(1.0, payload)])
    values = here._held[0].values
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1.0
    assert reducer.reduce(0, [(1.0, payload)]).payload == expected.payload


# ── bad input ────────────────────────────────────────────────────────────────────────────
def test_one_bad_part_is_refused_and_the_others_count() -> None:
    run = hybrid_manifest(admit=("lowrank",))
    here, other = train(peer(LORA4, run)), train(peer(ZO, run), 1)
    good = here.contribution().encode(0, 1)[0]
    seeds = other.contribution().encode(0, 1)[0]
    layer = here._layers[0].layer
    huge = LowRank(np.full((5, layer.n), 1.0), np.full((layer.m, 5), 1.0))
    reducer = here.reducer()
    alone = reducer.reduce(0, [(2.0, good)]).payload
    for bad in (b"", good[:-1], seeds, encode_lowrank(layer, good[9:17], huge, get_codec("fp32"))):
        with pytest.raises(DecodeError):
            reducer.check(0, bad)
        reduced = reducer.reduce(0, [(1.0, bad), (2.0, good)])
        assert [index for index, _ in reduced.refused] == [0]
        assert reduced.payload == alone
        assert reducer.reduce(0, [(1.0, bad)]).payload == b""
    for weight in (0.0, float("nan")):
        with pytest.raises(ValueError, match="weight"):
            reducer.reduce(0, [(weight, good)])
    with pytest.raises(ValueError, match="more than"):
        reducer.reduce(0, [(1.0, good)] * (PARTS_MAX + 1))


def test_factors_as_large_as_codecs_carry_make_a_state_that_can_be_sent() -> None:
    here = train(peer(LORA4))
    good = here.contribution().encode(0, 1)[0]
    layer = here._layers[0].layer
    huge = LowRank(np.full((2, layer.n), 2.0**63), np.full((layer.m, 2), 2.0**63), 2.0**16)
    payload = encode_lowrank(layer, good[9:17], huge, get_codec("fp32"))
    reduced = here.reducer().reduce(0, [(1.0, payload), (1.0, good)])
    outcome = [reduced.payload, *[b""] * (here.units - 1)]
    here.apply(outcome, inside(here, mine=False))
    assert here.refused_units == 0
    assert np.isfinite(here.state()[STATE]).all()


def test_an_outcome_that_is_none_changes_nothing_anywhere() -> None:
    here = train(peer(LORA4))
    outcome, _ = close(here, [here.contribution()])
    before = here.digest()
    nan = struct.pack("<f", float("nan"))
    for bad in (b"\x10", outcome[0][:-1], b"\x11" + outcome[0][1:], b"\x10" + nan + outcome[0][5:]):
        here.apply([bad, *[b""] * (here.units - 1)], inside(here, mine=False))
        assert here.digest() == before
    assert here.refused_units == 4
    with pytest.raises(ValueError, match="an outcome of"):
        here.apply(outcome[1:], inside(here)[1:], 1)


@each_kind
def test_work_that_is_not_finite_is_dropped_and_training_goes_on(means: Means) -> None:
    method = train(peer(means))
    first = method._layers[0]
    with torch.no_grad():
        (first.D if means is FULL else first.B).fill_(float("nan"))
    if means is ZO:
        method._own._scalars[0] = np.nan  # type: ignore[attr-defined]
    part = method.contribution()
    assert part.weight == 0
    assert part.encode(0, 2) == [b"", b""]
    assert not method.owes()
    assert method.dropped_work == 1
    assert near(total(method), state(method))
    assert np.isfinite(method.step(batch(1)).loss)


def test_a_state_of_another_run_is_refused() -> None:
    method = peer(LORA4)
    good = method.state()[STATE]
    broken = good.copy()
    broken[3] = np.inf
    bad: tuple[dict[str, Array], ...] = (
        {}, {"theta": good}, {STATE: good[1:]}, {STATE: good.astype(np.float64)}, {STATE: broken},
    )  # fmt: skip
    for arrays in bad:
        with pytest.raises(ValueError, match=STATE):
            method.load_state(arrays)


def test_moments_are_kept_over_a_restart() -> None:
    one, other = train(peer(LORA2), 3), peer(LORA2)
    other.load_inner_state(one.inner_state())
    for name, values in one.inner_state().items():
        assert (other.inner_state()[name] == values).all()
    peer(ZO).load_inner_state(one.inner_state())  # of another kind: no use, no harm
    peer(FULL).load_inner_state(one.inner_state())


# ── the manifest ─────────────────────────────────────────────────────────────────────────
def test_targets_and_ranks_that_fit_no_layer_name_the_field() -> None:
    for changes_, words in (
        ({"targets": ("no_such_layer",)}, r"method\.targets"),
        ({"rank": CONFIG["hidden_size"] + 1}, r"method\.rank"),
    ):
        run = hybrid_manifest()
        spec: Callable[..., Any] = replace
        run = replace(run, method=spec(run.method, **changes_))
        with pytest.raises(ManifestError, match=words):
            build_method(run, device="cpu", threads=1)


def test_targets_choose_layers_as_pefts_do() -> None:
    from peer.train.adapted import layers_of
    from peer.train.lora import adapt_by_peft
    from peer.train.models import build_model

    for targets in ((), ("q_proj", "mlp.up_proj")):
        run = hybrid_manifest(targets=targets)
        ours = list(layers_of(build_model(run, None), targets))
        by_peft = adapt_by_peft(build_model(run, None), run.method)
        theirs = {
            name.removeprefix("base_model.model.").partition(".lora_A")[0]
            for name, _ in by_peft.named_parameters()
            if ".lora_A" in name
        }
        assert set(ours) == theirs


# ── what comes out ───────────────────────────────────────────────────────────────────────
def _gpt2(run: Any) -> Any:
    run.model.config.clear()
    run.model.config.update(
        model_type="gpt2", vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    return run


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_export_is_the_merged_model_and_an_adapter_that_peft_loads(
    kind: str, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = _gpt2(hybrid_manifest()) if kind == "gpt2" else hybrid_manifest()
    peers = [peer(means, run, i) for i, means in enumerate((LORA2, FULL, ZO))]
    parts = [train(p, 3, i).contribution() for i, p in enumerate(peers)]
    outcome, _ = close(peers[0], parts)
    method = train(peers[0])  # own work is not exported
    method.apply(outcome, inside(method))
    method.export(str(tmp_path))
    ids = batch(50)
    with torch.no_grad(), method.outer_model() as model:
        own = model(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, own, atol=1e-5)
    plain_run = _gpt2(manifest()) if kind == "gpt2" else manifest()
    base = build_method(plain_run, device="cpu")
    with base.outer_model() as model, torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, own, atol=1e-3)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        assert torch.allclose(adapted(input_ids=ids).logits, own, atol=1e-5)
    assert np.isfinite(method.step(batch(2)).loss), "and training goes on"
