"""Weights that give the mean the least variance, checked against estimates that were drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peer.finetune.weights import Evidence, effective_dimension, inverse_variance, weight_of


def _estimates(
    rng: np.random.Generator, g_d: np.ndarray, perturbations: int, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """(zeroth-order estimates of g (draws, d), the scalars behind them (draws, P))."""
    z = rng.standard_normal((draws, perturbations, len(g_d)))
    rho = z @ g_d
    return np.einsum("sp,spd->sd", rho, z) / perturbations, rho


@pytest.mark.parametrize("perturbations", [1, 4])
def test_a_zeroth_order_estimate_is_as_long_as_theory_says(perturbations: int) -> None:
    rng = np.random.default_rng(perturbations)
    d = 50
    g_d = rng.standard_normal(d)
    g_d /= np.linalg.norm(g_d)
    made, rho = _estimates(rng, g_d, perturbations, 20_000)
    square = float(np.mean(np.sum(np.square(made), axis=1)))
    assert square == pytest.approx((d + perturbations + 1) / perturbations, rel=0.05)
    assert np.abs(made.mean(axis=0) - g_d).max() <= 0.05
    fitted = effective_dimension(float(np.mean(np.square(rho))), square, perturbations)
    assert fitted == pytest.approx(d, rel=0.1)


def test_the_weights_beat_tokens_alone_and_come_near_the_best() -> None:
    """First-order peers, and zeroth-order ones with 1 and 16 directions, estimate one gradient
    from tokens of their own; the noise of the draw is ten times the gradient."""
    rng = np.random.default_rng(0)
    d, draws = 40, 4_000
    g_d = rng.standard_normal(d) / math.sqrt(d)
    kinds = [(100.0, None), (50.0, 1), (400.0, 16), (25.0, None)]
    errors = []
    for tokens, perturbations in kinds:
        noise = rng.standard_normal((draws, d)) * math.sqrt(100.0 * 100.0 / tokens / d)
        own = g_d + noise
        if perturbations is not None:
            z = rng.standard_normal((draws, perturbations, d))
            own = np.einsum("spd,sp->sd", z, np.einsum("spd,sd->sp", z, own)) / perturbations
        errors.append(own - g_d)
    ours = [weight_of(Evidence(tokens=t, perturbations=p), effective_dim=d) for t, p in kinds]
    best = inverse_variance([float(np.mean(np.sum(np.square(e), axis=1))) for e in errors])

    def error(weights: list[float]) -> float:
        mean = sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
        return float(np.mean(np.sum(np.square(mean), axis=1)))

    assert error(ours) <= 1.02 * error(best)
    assert error(ours) < 0.5 * error([tokens for tokens, _ in kinds])
    assert error(ours) < 0.9 * error([100.0, 0.0, 0.0, 25.0])  # weak peers do help


def test_weights_in_limits_that_everybody_knows() -> None:
    first = weight_of(Evidence(tokens=100), effective_dim=1e6)
    assert first == 100.0  # a first-order peer's dimension is nobody's business
    assert weight_of(Evidence(tokens=100, perturbations=4), effective_dim=0) == 100.0
    one = weight_of(Evidence(tokens=100, perturbations=1), effective_dim=999)
    assert one == pytest.approx(0.1)
    late = weight_of(Evidence(tokens=100, versions_behind=4), effective_dim=0, staleness=0.5)
    assert late == pytest.approx(100 / 3)
    assert weight_of(Evidence(tokens=100, versions_behind=4), effective_dim=0) == 100.0


def test_inverse_variance_is_optimal_for_known_variances() -> None:
    assert inverse_variance([1.0, 4.0]) == [0.8, 0.2]
    assert inverse_variance([1e-320, 1e300]) == pytest.approx([1.0, 0.0])
    assert inverse_variance([0.0, 3.0, 0.0]) == [0.5, 0.0, 0.5]
    shares = np.array(inverse_variance([2.0, 3.0, 7.0]))
    variances = np.array([2.0, 3.0, 7.0])
    least = float(np.sum(shares**2 * variances))
    assert least == pytest.approx(1 / np.sum(1 / variances))
    for seed in range(20):
        other = np.random.default_rng(seed).dirichlet(np.ones(3))
        assert float(np.sum(other**2 * variances)) >= least


def test_numbers_without_meaning_are_refused() -> None:
    for make in (
        lambda: Evidence(tokens=0),
        lambda: Evidence(tokens=math.nan),
        lambda: Evidence(tokens=math.inf),
        lambda: Evidence(tokens=1, perturbations=0),
        lambda: Evidence(tokens=1, versions_behind=-1),
        lambda: weight_of(Evidence(tokens=1), effective_dim=-1.0),
        lambda: weight_of(Evidence(tokens=1), effective_dim=math.nan),
        lambda: weight_of(Evidence(tokens=1), effective_dim=1.0, staleness=-0.1),
        lambda: inverse_variance([]),
        lambda: inverse_variance([1.0, -1.0]),
        lambda: inverse_variance([math.nan]),
        lambda: effective_dimension(0.0, 1.0, 1),
        lambda: effective_dimension(1.0, math.inf, 1),
        lambda: effective_dimension(1.0, 1.0, 0),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            make()
