"""Adapters are averaged as products, at their own rank, and go on training from the average."""

from __future__ import annotations

import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from peer.errors import ManifestError
from peer.finetune.products import mean_product
from peer.manifest import MethodSpec
from peer.train import build_method
from peer.train.flat import FrozenWork
from peer.train.lora import PARTS_MAX, LoraMethod
from tensorcodecs import DecodeError
from tests.train.tiny import CONFIG, batch, built, everywhere, manifest, method, reduce

Array = npt.NDArray[Any]


def _factors(rng: np.random.Generator, m: int, r: int, n: int) -> tuple[Array, Array]:
    return rng.standard_normal((r, n)), rng.standard_normal((m, r)) * 0.1


@pytest.mark.parametrize(("m", "n"), [(48, 32), (32, 48), (8, 200), (5, 4)])
def test_the_mean_of_products_is_the_dense_sum_where_the_rank_holds_it(m: int, n: int) -> None:
    rng = np.random.default_rng(m)
    (a1, b1), (a2, b2) = _factors(rng, m, 4, n), _factors(rng, m, 4, n)
    b1[:, 2:], b2[:, :1] = 0, 0
    a2[1] = a1[0]  # five columns in use, but they share a row: rank four in all
    dense = 0.3 * b1 @ a1 + 0.7 * b2 @ a2
    (A, B), tail = mean_product([(0.3, (a1, b1)), (0.7, (a2, b2))])
    assert np.linalg.norm(B @ A - dense) <= 1e-5 * np.linalg.norm(dense)
    assert tail <= 1e-5 * np.linalg.norm(dense)


@pytest.mark.parametrize(("m", "n"), [(48, 32), (32, 48), (64, 8)])
def test_what_the_rank_cannot_hold_is_exactly_the_tail_of_singular_values(m: int, n: int) -> None:
    rng = np.random.default_rng(n)
    parts = [(p, _factors(rng, m, 4, n)) for p in (0.2, 0.3, 0.5)]
    dense = sum(p * B @ A for p, (A, B) in parts)
    (A, B), tail = mean_product(parts)
    expected = float(np.sqrt(np.sum(np.square(np.linalg.svd(dense)[1][4:]))))
    assert np.linalg.norm(B @ A - dense) == pytest.approx(expected, rel=1e-9)
    assert tail == pytest.approx(expected, rel=1e-9)


def test_averaging_the_factors_would_be_something_else() -> None:
    rng = np.random.default_rng(0)
    (a1, b1), (a2, b2) = _factors(rng, 48, 4, 32), _factors(rng, 48, 4, 32)
    dense = 0.5 * b1 @ a1 + 0.5 * b2 @ a2
    wrong = (b1 + b2) / 2 @ (a1 + a2) / 2
    cross = 0.5 * 0.5 * (b1 - b2) @ (a1 - a2)
    assert np.allclose(dense - wrong, cross)
    (A, B), _ = mean_product([(0.5, (a1, b1)), (0.5, (a2, b2))])
    assert np.linalg.norm(B @ A - dense) < np.linalg.norm(wrong - dense)


def test_one_member_gets_its_own_factors_back() -> None:
    rng = np.random.default_rng(1)
    a, b = _factors(rng, 48, 4, 32)
    (A, B), tail = mean_product([(1.0, (a, b))])
    assert np.allclose(A, a)
    assert np.allclose(B, b)
    assert tail <= 1e-12


@pytest.mark.parametrize("used", [0, 1, 3])
def test_a_fresh_adapter_keeps_its_rows(used: int) -> None:
    rng = np.random.default_rng(2)
    a, b = _factors(rng, 48, 4, 32)
    b[:, used:] = 0
    (A, B), _ = mean_product([(0.5, (a, b)), (0.5, (a, b))])
    assert np.allclose(B @ A, b @ a)
    assert np.allclose(A, a)  # with B = 0 and A = 0 no gradient would ever come back


def test_nearly_parallel_rows_do_not_blow_up_the_columns() -> None:
    rng = np.random.default_rng(3)
    a, b = _factors(rng, 48, 4, 32)
    a[1] = a[0] + 1e-6 * a[1]
    (A, B), _ = mean_product([(0.5, (a, b)), (0.5, (a, -b + 0.01))])
    dense = 0.5 * b @ a + 0.5 * (-b + 0.01) @ a
    assert np.allclose(B @ A, dense, atol=1e-6)
    assert np.linalg.norm(B) < 100 * np.linalg.norm(b)


def _products(made: LoraMethod, flat: Array) -> list[Array]:
    pairs = [adapter.split(flat[adapter.where]) for adapter in made._adapters]
    return [B.astype(np.float64) @ A.astype(np.float64) for A, B in pairs]


def _lora() -> LoraMethod:
    made = method("lora")
    assert isinstance(made, LoraMethod)
    return made


def test_peers_start_alike_and_stay_alike_and_the_outcome_is_the_mean_product() -> None:
    peers = [_lora(), _lora()]
    assert peers[0].digest() == peers[1].digest()
    for round_ in range(3):
        parts: list[FrozenWork] = []
        for i, peer in enumerate(peers):
            for step in range(2):
                peer.step(batch(100 * i + 10 * round_ + step))
            parts.append(peer.contribution())
        before = [_products(peer, peer.inner.to_numpy()) for peer in peers]
        outcome = reduce(peers[0], parts)
        for peer in peers:
            peer.apply(outcome, everywhere(peer, True))
        assert peers[0].digest() == peers[1].digest()
        for one, other, mean in zip(
            *before, _products(peers[0], peers[0].state()["factors"]), strict=True
        ):
            dense = (one + other) / 2
            u, s, vt = np.linalg.svd(dense)
            best = (u[:, :4] * s[:4]) @ vt[:4]
            assert np.linalg.norm(mean - best) <= 1e-5 * np.linalg.norm(dense)
        for peer in peers:  # nothing was in flight, so both stand on the average
            shift = np.abs(peer.inner.to_numpy() - peer.state()["factors"])
            assert shift.max() <= 1e-6


def test_work_in_flight_and_missed_work_stay_on_the_factors() -> None:
    made, other = _lora(), _lora()
    made.step(batch(1))
    other.step(batch(2))
    missed = made.state()["factors"] - made.inner.to_numpy()
    made.contribution()
    outcome = reduce(other, [other.contribution()])
    made.apply(outcome, everywhere(made, False))
    left = made.state()["factors"] - made.inner.to_numpy()
    assert np.abs(left - missed).max() <= 1e-6
    stale = 64 / 1.5  # outer.staleness is 0.5, and it missed one exchange
    assert made.contribution().weight == pytest.approx(stale)


def test_alone_the_product_is_preserved_and_the_loss_falls() -> None:
    made = _lora()
    held = [batch(500)]
    start = made.evaluate(held)
    for round_ in range(4):
        for i in range(3):
            made.step(batch(10 * round_ + i))
        before = _products(made, made.inner.to_numpy())
        made.apply(reduce(made, [made.contribution()]), everywhere(made, True))
        for a, b in zip(before, _products(made, made.inner.to_numpy()), strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * float(np.linalg.norm(a)) + 1e-9
    assert made.evaluate(held) < start - 0.1


def test_a_pair_of_another_shape_is_refused_and_nothing_of_it_is_kept() -> None:
    made = _lora()
    made.step(batch(1))
    part = made.contribution()
    (good,) = part.encode(0, 1)
    m, r, n = struct.unpack_from("<III", good)
    reducer = made.reducer()
    reducer.check(0, good)
    for bad in (
        b"",
        good[:11],
        good[:-1],
        struct.pack("<III", n + 1, r, m) + good[12:],
        struct.pack("<III", 2**32 - 1, 2**32 - 1, 2**32 - 1) + good[12:],
        good[:40] + bytes([good[40] ^ 1]) + good[41:],
    ):
        with pytest.raises(DecodeError):
            reducer.check(0, bad)
        reduced = reducer.reduce(0, [(1.0, bad), (2.0, good)])
        assert reduced.payload == reducer.reduce(0, [(2.0, good)]).payload
        assert [index for index, _ in reduced.refused] == [0]
        assert reducer.reduce(0, [(1.0, bad)]).payload == b""
    for weight in (0.0, float("nan")):
        with pytest.raises(ValueError, match="weight"):
            reducer.reduce(0, [(weight, good)])
    reducer.reduce(0, [(1.0, good)] * PARTS_MAX)
    with pytest.raises(ValueError, match="more than"):
        reducer.reduce(0, [(1.0, good)] * (PARTS_MAX + 1))


def test_the_export_holds_the_merged_model_and_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = _lora()
    for i in range(4):
        made.step(batch(i))
    made.apply(reduce(made, [made.contribution()]), everywhere(made, True))
    made.export(str(tmp_path))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    ids = batch(50)
    with torch.no_grad(), made.outer_model() as model:
        own = model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, own, atol=1e-5)
    base = build_method(manifest(), device="cpu")  # the same seed, so the same frozen weights
    with base.outer_model() as model, torch.no_grad():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        assert torch.allclose(adapted(input_ids=ids).logits, own, atol=1e-5)


def test_gpt2s_transposed_layers_are_adapted_the_right_way_round(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = manifest("lora")
    made.model.config.clear()
    made.model.config.update(
        model_type="gpt2", vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    adapted = built(made)
    for i in range(2):
        adapted.step(batch(i))
    adapted.apply(reduce(adapted, [adapted.contribution()]), everywhere(adapted, True))
    adapted.export(str(tmp_path))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    with torch.no_grad(), adapted.outer_model() as model:
        own = model(input_ids=batch(9)).logits
        assert torch.allclose(merged(input_ids=batch(9)).logits, own, atol=1e-5)


def test_targets_that_fit_nothing_and_ranks_that_fit_no_layer_name_the_field() -> None:
    made = manifest("lora")
    for spec, words in (
        (MethodSpec(kind="lora", targets=("no_such_layer",)), r"method\.targets"),
        (MethodSpec(kind="lora", rank=CONFIG["hidden_size"] + 1), r"method\.rank"),
    ):
        object.__setattr__(made, "method", spec)
        with pytest.raises(ManifestError, match=words):
            build_method(made, device="cpu")


def test_fedit_averages_the_factors_and_ends_elsewhere() -> None:
    run = manifest("lora")
    run = replace(run, method=replace(run.method, aggregate="fedit"))
    made = [(built(run), built(run)), (_lora(), _lora())]
    for pair in made:
        parts = []
        for i, peer in enumerate(pair):
            for step in range(3):
                peer.step(batch(100 * i + step))
            parts.append(peer.contribution())
        ends = [peer.inner.to_numpy() for peer in pair]
        outcome = reduce(pair[0], parts)
        for peer in pair:
            peer.apply(outcome, everywhere(peer, True))
        assert pair[0].digest() == pair[1].digest()
        mean = (ends[0].astype(np.float64) + ends[1]) / 2
        off = np.abs(pair[0].state()["factors"] - mean).max()
        assert (off <= 1e-6) == (pair is made[0]), "exact does not average factors"
