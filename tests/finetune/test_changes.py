"""What a change to a layer is, which way round it is folded in, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from peer.finetune.changes import (
    SCALE_MAX,
    Change,
    Dense,
    Expanded,
    LowRank,
    Sparse,
    check_change,
)
from tests.finetune.drawn import LAYERS, apart, pair


@pytest.mark.parametrize(("m", "n"), LAYERS)
def test_a_change_is_folded_into_linear_and_conv1d_the_right_way_round(m: int, n: int) -> None:
    rng = np.random.default_rng(m + n)
    change = pair(rng, m, 3, n, alpha=12.0)
    x_n, weight_mn = rng.standard_normal(n), rng.standard_normal((m, n)).astype(np.float32)
    moved_m = weight_mn.astype(np.float64) @ x_n + 4.0 * (change.B @ (change.A @ x_n))
    linear, conv1d = weight_mn.copy(), weight_mn.T.copy()
    change.fold_into(linear, stored_transposed=False)
    change.fold_into(conv1d, stored_transposed=True)
    assert apart(x_n @ linear.T, moved_m) <= 1e-5  # torch.nn.Linear
    assert apart(x_n @ conv1d, moved_m) <= 1e-5  # GPT-2's Conv1D


def test_a_change_of_many_rows_is_folded_in_whole() -> None:
    rng = np.random.default_rng(0)
    change = pair(rng, 1000, 3, 5)
    weight = np.zeros((1000, 5))
    change.fold_into(weight, stored_transposed=False)
    assert apart(weight, change.dense()) <= 1e-12


def test_the_wrong_way_round_is_refused() -> None:
    change = pair(np.random.default_rng(1), 6, 2, 4)
    for shape, transposed in (((6, 4), True), ((4, 6), False), ((5, 4), False)):
        with pytest.raises(ValueError, match="for a change of 6 x 4"):
            change.fold_into(np.zeros(shape), stored_transposed=transposed)


@pytest.mark.parametrize(("m", "n"), LAYERS)
def test_the_norm_is_that_of_the_product(m: int, n: int) -> None:
    change = pair(np.random.default_rng(2), m, 4, n, alpha=3.0)
    assert change.norm() == pytest.approx(float(np.linalg.norm(change.dense())), rel=1e-12)


@pytest.mark.parametrize("places", [[3, 4, 7], [1, 11, 21, 31], [0, 13, 26, 39, 52, 65, 78], []])
def test_a_sparse_change_is_the_same_as_factors_or_stays_what_it_is(places: list[int]) -> None:
    values = np.arange(1.0, len(places) + 1)
    sparse = Sparse(np.array(places, np.int64), values, (10, 12))
    dense = np.zeros(120)
    dense[places] = values
    assert np.array_equal(sparse.dense(), dense.reshape(10, 12))
    factors = sparse.factors()
    if factors is not None:
        assert np.array_equal(factors.dense(), sparse.dense())
        assert factors.rank * (10 + 12) < 10 * 12


def test_few_rows_or_few_columns_make_few_factors() -> None:
    row = Sparse(np.arange(12, 24, dtype=np.int64), np.ones(12), (10, 12)).factors()
    column = Sparse(np.arange(5, 120, 12, dtype=np.int64), np.ones(10), (10, 12)).factors()
    assert row is not None
    assert column is not None
    assert (row.rank, column.rank) == (1, 1)


A, B = np.ones((2, 5)), np.ones((7, 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowRank(A, np.ones((7, 3))),
        lambda: LowRank(A[0], B),
        lambda: LowRank(np.ones((0, 5)), np.ones((7, 0))),
        lambda: LowRank(A, B, float("nan")),
        lambda: LowRank(A.astype(int), B),
        lambda: LowRank(A * float("nan"), B),
        lambda: LowRank(A, B * float("inf")),
        lambda: Dense(np.full((2, 3), -float("inf"))),
        lambda: Dense(np.ones(3)),
        lambda: Dense(np.ones((0, 3))),
        lambda: Sparse(np.array([3, 2]), np.ones(2), (2, 3)),
        lambda: Sparse(np.array([2, 2]), np.ones(2), (2, 3)),
        lambda: Sparse(np.array([-1]), np.ones(1), (2, 3)),
        lambda: Sparse(np.array([6]), np.ones(1), (2, 3)),
        lambda: Sparse(np.array([1], np.int32), np.ones(1), (2, 3)),
        lambda: Sparse(np.array([1]), np.ones(2), (2, 3)),
        lambda: Sparse(np.array([1]), np.array([float("nan")]), (2, 3)),
        lambda: Expanded(lambda: Dense(np.ones((3, 2))), (2, 3)).made(),
    ],
)
def test_nonsense_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=r"\w"):
        make()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (LowRank(np.ones((6, 5)), np.ones((7, 6))), "rank 6"),
        (LowRank(np.ones((2, 7)), np.ones((5, 2))), "a layer of"),
        (LowRank(A, B, -1.0), "scale"),
        (LowRank(A, B, 2 * SCALE_MAX), "scale"),
        (LowRank(A * 2.0**65, B), "A: holds"),
        (LowRank(A, B * -(2.0**65)), "B: holds"),
        (Dense(np.full((7, 5), 2.0**65)), "beyond"),
        (Sparse(np.array([1]), np.array([2.0**65]), (7, 5)), "beyond"),
        (Expanded(lambda: Dense(np.ones((5, 7))), (5, 7)), "a layer of"),
    ],
)
def test_what_does_not_belong_to_the_layer_is_refused(change: Change, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_change(change, (7, 5))


def test_what_belongs_to_the_layer_is_let_in() -> None:
    for change in (
        LowRank(A, B, 0.25),
        Dense(np.ones((7, 5), np.float32)),
        Sparse(np.array([34]), np.ones(1), (7, 5)),
        Expanded(lambda: LowRank(A, B), (7, 5)),
    ):
        check_change(change, (7, 5))
