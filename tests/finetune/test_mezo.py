"""Gradients from forward passes: their moments, their memory, and values that stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from peer.finetune import mezo, tensors
from peer.finetune.perturb import NOTHING, Directions, derive_seed, z_of
from peer.finetune.tensors import Weights
from tests.finetune.models import PeakBytes, counting, next_token_loss, tiny_gpt, tiny_lora

DIMENSIONS = 200
DRAWS = 4000


class Slope(torch.nn.Module):
    """L(theta) = gradient * theta: differences are exact whatever eps."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.gradient = torch.from_numpy(rng.standard_normal(DIMENSIONS)).float()
        self.theta = torch.nn.Parameter(torch.zeros(DIMENSIONS))

    def forward(self) -> torch.Tensor:
        return self.gradient @ self.theta


def estimates(noise: Any, form: mezo.Form, count: int, perturbations: int = 1) -> torch.Tensor:
    """(count, d) float64: so many estimates of the slope's gradient."""
    model = Slope()
    held = Weights(model, noise=noise)
    rows = []
    for draw in range(count):
        seeds = [derive_seed(noise, draw, p) for p in range(perturbations)]
        measured = mezo.measure(held, model, seeds, eps=1.0, form=form)
        z = [z_of("theta", DIMENSIONS, seed, noise).double() for seed in seeds]
        rows.append(sum(rho * z for rho, z in zip(measured.slopes, z, strict=True)) / len(seeds))
    return torch.stack(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("noise", "expected"), [("gaussian", DIMENSIONS + 2), ("rademacher", DIMENSIONS)]
)
def test_the_mean_square_of_an_estimate_is_d_plus_two_times_the_gradients(
    noise: str, expected: int
) -> None:
    gradient = Slope().gradient.double()
    found = estimates(noise, "central", DRAWS)
    ratio = float((found**2).sum(1).mean() / (gradient @ gradient))
    # (z . u)^2 |z|^2 has about 1.45 times its mean as deviation: four sigma of 4000 are 9 %
    assert abs(ratio / expected - 1) < 4 * 1.45 / math.sqrt(DRAWS)
    mean_error = float(((found.mean(0) - gradient) ** 2).sum() / (gradient @ gradient))
    assert abs(mean_error / ((expected - 1) / DRAWS) - 1) < 4 * math.sqrt(2 / DIMENSIONS)


def test_more_directions_divide_the_excess() -> None:
    gradient = Slope().gradient.double()
    found = estimates("gaussian", "forward", 1500, perturbations=4)
    ratio = float((found**2).sum(1).mean() / (gradient @ gradient))
    assert abs(ratio / (1 + (DIMENSIONS + 1) / 4) - 1) < 0.08


def test_forward_and_central_differences_agree_where_the_loss_is_straight() -> None:
    model = Slope()
    held = Weights(model)
    seeds = [5, 6, 7]
    central = mezo.measure(held, model, seeds, 0.5).slopes
    forward = mezo.measure(held, model, seeds, 0.5, "forward").slopes
    truth = [float(z_of("theta", DIMENSIONS, s, "gaussian") @ model.gradient) for s in seeds]
    assert central == pytest.approx(truth, rel=1e-4)
    assert forward == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("form", mezo.FORMS)
def test_the_number_of_forward_passes_is_the_documented_one(form: mezo.Form) -> None:
    model, calls = Slope(), []

    def loss() -> torch.Tensor:
        calls.append(1)
        return model()  # type: ignore[no-any-return]

    held = Weights(model)
    held.trace(loss)
    calls.clear()
    mezo.measure(held, loss, range(5), 0.5, form)
    assert len(calls) == (10 if form == "central" else 6)


@pytest.mark.parametrize("master", ["fp32", "bf16"])
@pytest.mark.parametrize("build", [tiny_gpt, tiny_lora])
def test_measuring_leaves_every_bit_as_it_was(
    build: Callable[[], torch.nn.Module], master: str
) -> None:
    model = build()
    held = Weights(model, master, compute=torch.float32)
    ids = counting(1)
    before, values = held.digest(), held.state()
    mezo.measure(held, lambda: next_token_loss(model, ids), range(4), 1e-2)
    assert held.digest() == before
    assert all(torch.equal(values[name], held.state()[name]) for name in held.names)


def test_adding_in_place_would_not() -> None:
    """Why nothing is added in place: sums are rounded."""
    theta = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    z = z_of("w", 10_000, 1, "gaussian") * 1e-3
    back = theta + z - 2 * z + z
    assert float((back != theta).float().mean()) > 0.1


def test_the_model_runs_exactly_a_step_away() -> None:
    model, other = tiny_gpt(), tiny_gpt()
    ids = counting(2)
    held = Weights(model)
    held.trace(lambda: next_token_loss(model, ids))
    step = Directions.of([(3, 0.01), (4, -0.02)])
    with torch.no_grad(), held.moved(step):
        passing = next_token_loss(model, ids)
    moved = Weights(other)
    moved.apply(step, dither_seed=0)
    with torch.no_grad():
        applied = next_token_loss(other, ids)
    assert torch.equal(passing, applied)
    assert held.digest() != moved.digest()


def test_an_error_in_the_model_leaves_the_values() -> None:
    model = tiny_gpt()
    held = Weights(model)
    before = held.digest()
    held.trace(lambda: next_token_loss(model, counting(1)))
    with pytest.raises(IndexError), held.moved(Directions.of([(1, 1.0)])):
        model(input_ids=torch.full((1, 4), 10**6))
    assert held.digest() == before
    assert torch.isfinite(next_token_loss(model, counting(1)))


class Borrower(torch.nn.Module):
    """Uses its child's tensor without calling the child, as torch's attention does."""

    def __init__(self, also_calls: bool) -> None:
        super().__init__()
        self.child = torch.nn.Linear(8, 8)
        self.also_calls = also_calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.child.weight.t() + self.child.bias
        return (self.child(y) if self.also_calls else y).square().mean()


def test_a_tensor_used_by_the_parent_is_perturbed_with_the_parent() -> None:
    model, x = Borrower(also_calls=False), torch.ones(2, 8)
    held = Weights(model)
    measured = mezo.measure(held, lambda: model(x), [1], 1e-3)
    assert measured.finite
    assert abs(measured.slopes[0]) > 0


def test_a_tensor_used_where_its_module_does_not_run_is_refused() -> None:
    model, x = Borrower(also_calls=True), torch.ones(2, 8)
    with pytest.raises(ValueError, match="outside the module that holds it"):
        mezo.measure(Weights(model), lambda: model(x), [1], 1e-3)


def test_torchs_own_attention_can_be_trained() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    held = Weights(layer)
    measured = mezo.measure(held, lambda: layer(x)[:, 0].sum(), [1, 2], 1e-3)
    assert measured.finite


def test_memory_is_that_of_inference_and_one_modules_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peer.finetune.perturb.CHUNK_VALUES", 2**12)
    model = tiny_gpt(num_hidden_layers=6)
    ids = counting(0, samples=1)
    held = Weights(model)

    def loss() -> torch.Tensor:
        return next_token_loss(model, ids)

    held.trace(loss)
    with PeakBytes() as inference, torch.no_grad():
        loss()
    with PeakBytes() as zeroth:
        mezo.step(held, loss, [1], 1e-3, 1e-3)
    with PeakBytes() as first:
        loss().backward()  # type: ignore[no-untyped-call]
    largest = max(4 * p.numel() for p in model.parameters())
    model_bytes = 4 * held.numel
    assert zeroth.peak <= inference.peak + largest + 3 * 4 * 2**12
    assert zeroth.peak < 0.4 * model_bytes  # no copy of the model, no z of all of it
    assert first.peak > 8 * zeroth.peak


def test_a_step_in_bfloat16_keeps_what_rounding_to_nearest_would_drop() -> None:
    """A hundred steps of a sixteenth of the last place: on average they arrive."""
    model = torch.nn.Linear(1, 50_000, bias=False)
    model.weight.data.fill_(1.0)
    held = Weights(model, "bf16")
    for number in range(100):
        step = Directions.of([(9, 2.0**-11)])  # bfloat16's last place at one is 2**-7
        held.apply(step, dither_seed=number)
    drift = model.weight.data.float().view(-1) - 1
    z = z_of("weight", 50_000, 9, "gaussian")
    slope = float((drift @ z) / (z @ z))
    assert slope == pytest.approx(100 * 2.0**-11, rel=0.03)


def test_stochastic_rounding_has_the_right_mean_and_exact_values_stay() -> None:
    values = torch.tensor([1.0, -1.0, 1 + 2**-9, -1 - 2**-9, 3.0e-3, 0.0]).repeat_interleave(20_000)
    bits = torch.randint(0, 2**16, values.shape, generator=torch.Generator().manual_seed(0))
    rounded = tensors._round_by(values, bits.int()).float()
    mean = rounded.view(6, -1).mean(1)
    assert torch.allclose(mean, values.view(6, -1)[:, 0], rtol=3e-4, atol=0)
    exact = values.to(torch.bfloat16).float() == values
    assert torch.equal(rounded[exact], values[exact])


def test_the_digest_knows_names_shapes_types_and_values() -> None:
    def digest(name: str, shape: tuple[int, ...], master: str, value: float) -> bytes:
        model = torch.nn.Module()
        model.register_parameter(name, torch.nn.Parameter(torch.full(shape, value)))
        return Weights(model, master).digest()

    kinds = [
        ("a", (4,), "fp32", 1.0), ("b", (4,), "fp32", 1.0), ("a", (2, 2), "fp32", 1.0),
        ("a", (4,), "bf16", 1.0), ("a", (4,), "fp32", 1.5),
    ]  # fmt: skip
    assert len({digest(*kind) for kind in kinds}) == len(kinds)


def test_another_models_state_is_refused_and_changes_nothing() -> None:
    held = Weights(torch.nn.Linear(3, 2))
    before, state = held.digest(), held.state()
    with pytest.raises(ValueError, match="bias"):
        held.load({"weight": state["weight"]})
    with pytest.raises(ValueError, match="weight"):
        held.load(state | {"weight": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match="bias"):
        held.load(state | {"bias": torch.zeros(2, dtype=torch.bfloat16)})
    assert held.digest() == before
    with pytest.raises(ValueError, match="no trainable"):
        Weights(torch.nn.ReLU())


def test_a_loss_that_is_no_number_changes_nothing() -> None:
    model = Slope()
    held = Weights(model)
    before = held.digest()
    measured = mezo.step(held, lambda: model() * math.nan, [1], 1e-3, 1.0)
    assert not measured.finite
    assert held.digest() == before
    with pytest.raises(ValueError, match="eps"):
        mezo.measure(held, model, [1], 0.0)
    assert mezo.measure(held, model, [], 1.0, at=NOTHING).slopes == ()


def test_mezo_lowers_the_loss_of_a_small_language_model() -> None:
    model = tiny_gpt()
    held = Weights(model)
    ids = counting(0, samples=8)
    losses = []
    for number in range(40):
        seeds = [derive_seed("train", number, p) for p in range(4)]
        measured = mezo.step(held, lambda: next_token_loss(model, ids), seeds, 1e-3, 1e-2)
        losses.append(measured.loss)
    assert losses[-1] < losses[0] - 0.1
