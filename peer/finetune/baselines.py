"""How others combine adapters, to compare with, and where each is what somebody wants.

| function | what it does | exact |
|---|---|---|
| `fedit` | averages A and B one by one (FedIT, arXiv 2305.05644) | no |
| `fedex` | that, and the exact residual as factors (FedEx-LoRA, 2410.09432) | with the residual |
| `flora` | stacks factors, the weight on one of them (FLoRA, 2409.05976) | yes; rank sum r |
| `flexlora` | one SVD of the sum, cut to each rank (FlexLoRA, 2402.11505) | to the rank |
| `ffa` | one A, frozen, on all peers; averages B (FFA-LoRA, 2403.12313) | yes |
| `fedsa` | averages A; every peer keeps its B (FedSA-LoRA, 2410.01463) | not meant to be |
| `padded_mean` | pads ranks with zeros, averages (HetLoRA, EMNLP 2024) | no |
| `rbla` | averages each rank's row over the peers that have it (RBLA, 2408.08699) | no |

`peer.finetune.products` is what to use unless one of them is wanted. All take (weight, factors)
pairs of one layer; weights need not add up to one.

Shapes: m x n = the layer, r = rank, R = the largest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from peer.finetune.changes import Float64, LowRank
from peer.finetune.products import Projection, mean_of, shares_of, stack

Parts = Sequence[tuple[float, LowRank]]

PRUNE_SHARE: Final = 0.99
"""gamma of HetLoRA: the share of its rank that a peer may shrink to."""


def fedit(parts: Parts) -> LowRank:
    """The mean of the A times the mean of the B.

    Off the mean of products by half the sum of p_i p_j (B_i - B_j)(A_i - A_j), so exact for one
    peer and for equal ones.

    Raises:
        ValueError: ranks, scales or shapes differ, or a weight is not positive.
    """
    shared = _shared(parts)
    first = parts[0][1]
    if any(part.rank != first.rank or part.scale != first.scale for _, part in parts):
        raise ValueError("factors of different ranks or scales have no common average")
    A = _sum([share * part.A.astype(np.float64) for share, part in shared])
    B = _sum([share * part.B.astype(np.float64) for share, part in shared])
    return LowRank(A, B, first.scale)


def fedex(parts: Parts) -> tuple[LowRank, LowRank]:
    """(FedIT's mean, what it lacks), whose sum is exact. What lacks has rank sum r + r and belongs
    into the frozen weight (`LowRank.fold_into`, which asks which way round that is stored).

    Raises: like `fedit`.
    """
    mean = fedit(parts)
    return mean, stack([*_shared(parts), (-1.0, mean)])


def flora(parts: Parts) -> LowRank:
    """[B_1 | ... | B_N] and [p_1 s_1 A_1; ...]: to be added to the frozen weight; the adapters
    begin afresh. Exact, and as large as all that came in.

    Raises:
        ValueError: no parts, shapes that differ, or a weight that is not positive.
    """
    shared = _shared(parts)
    A = np.concatenate([share * part.scale * part.A.astype(np.float64) for share, part in shared])
    return LowRank(A, np.concatenate([part.B.astype(np.float64) for _, part in shared], axis=1))


def flexlora(parts: Parts, receivers: Sequence[tuple[int, float]]) -> list[Projection]:
    """The mean of products at each receiver's (rank, scale), the singular values' roots on both
    sides. `products` differs in one thing: it stays near to the factors that a peer had.

    Raises:
        ValueError: like `flora`, or a rank that the layer has not.
    """
    spectrum = mean_of(parts).spectrum(1)
    return [spectrum.project(rank, scale=scale) for rank, scale in receivers]


def ffa(parts: Parts) -> LowRank:
    """The mean of the B under the one A that everybody has. Exact, and half the bytes; noise for
    privacy enters linearly.

    Raises:
        ValueError: the A differ in any bit, ranks or scales differ, or a weight is not positive.
    """
    first = parts[0][1] if parts else None
    if first is not None and any(not np.array_equal(part.A, first.A) for _, part in parts):
        raise ValueError("an A that was trained, or another one: with FFA it is frozen")
    mean = fedit(parts)
    return LowRank(parts[0][1].A, mean.B, mean.scale)


def fedsa(parts: Parts, own: LowRank) -> LowRank:
    """The mean of the A; this peer's own B, which nobody else sees (personalisation).

    Raises:
        ValueError: like `fedit`, or `own` is of another rank, scale or shape.
    """
    mean = fedit(parts)
    if (own.rank, own.scale, own.shape) != (mean.rank, mean.scale, mean.shape):
        raise ValueError("own factors of another rank, scale or shape than the mean's")
    return LowRank(mean.A, own.B, own.scale)


# ── ranks that differ ────────────────────────────────────────────────────────────────────
def padded_mean(parts: Parts) -> LowRank:
    """The factors padded with zeros to the largest rank and averaged, the scales folded into B.

    Raises:
        ValueError: no parts, shapes that differ, or a weight that is not positive.
    """
    shared = _shared(parts)
    m, n = shared[0][1].shape
    top = max(part.rank for _, part in shared)
    A_Rn, B_mR = np.zeros((top, n)), np.zeros((m, top))
    for share, part in shared:
        A_Rn[: part.rank] += share * part.A
        B_mR[:, : part.rank] += share * part.scale * part.B
    return LowRank(A_Rn, B_mR)


def sparsity_weights(parts: Parts) -> list[float]:
    """HetLoRA's weights: the norm of each peer's product, in shares. The pairs' own are not used.

    Raises:
        ValueError: no parts, or a product that is zero.
    """
    return shares_of([part.norm() for _, part in parts])


def hetlora(parts: Parts) -> LowRank:
    """HetLoRA's server: `padded_mean` with `sparsity_weights`. A peer takes `truncated` of it."""
    weights = sparsity_weights(parts)
    return padded_mean([(w, part) for w, (_, part) in zip(weights, parts, strict=True)])


def truncated(change: LowRank, rank: int, *, scale: float = 1.0) -> LowRank:
    """The first `rank` rows of A and columns of B, for a peer with that scale.

    Raises:
        ValueError: it has no so many, or the scale is 0.
    """
    if not 1 <= rank <= change.rank or scale == 0.0:
        raise ValueError(f"the first {rank} of {change.rank} ranks at a scale of {scale}")
    B_mr = change.B[:, :rank].astype(np.float64) * (change.scale / scale)
    return LowRank(change.A[:rank].astype(np.float64), B_mr, scale)


def padded(change: LowRank, rank: int) -> LowRank:
    """The same product with zeros for the ranks that it lacks.

    Raises:
        ValueError: it has more.
    """
    lacks = rank - change.rank
    if lacks < 0:
        raise ValueError(f"rank {change.rank} does not fit into {rank}")
    return LowRank(
        np.pad(change.A.astype(np.float64), ((0, lacks), (0, 0))),
        np.pad(change.B.astype(np.float64), ((0, 0), (0, lacks))),
        change.scale,
    )


def prune_penalty(change: LowRank, kept: int) -> tuple[float, Float64, Float64]:
    """(||B[:, kept:]|| ||A[kept:]||, its gradient in A, its gradient in B): what HetLoRA adds to a
    peer's loss, times lambda, so that the ranks that it may lose shrink if nothing needs them.

    A norm of zero has no gradient; 0 is given.
    """
    A = change.A[kept:].astype(np.float64)
    B = change.B[:, kept:].astype(np.float64)
    norm_A, norm_B = float(np.linalg.norm(A)), float(np.linalg.norm(B))
    grad_A, grad_B = np.zeros(change.A.shape), np.zeros(change.B.shape)
    if norm_A > 0.0:
        grad_A[kept:] = norm_B / norm_A * A
    if norm_B > 0.0:
        grad_B[:, kept:] = norm_A / norm_B * B
    return norm_A * norm_B, grad_A, grad_B


def pruned_rank(before: LowRank, after: LowRank, share: float = PRUNE_SHARE) -> int:
    """The rank that a peer goes on with: `share` of it where the penalty of the rest fell during
    its local steps, at least 1; else all of it."""
    kept = max(1, min(after.rank - 1, int(after.rank * share)))
    if after.rank == 1 or prune_penalty(after, kept)[0] >= prune_penalty(before, kept)[0]:
        return after.rank
    return kept


def rbla(parts: Parts) -> LowRank:
    """Each rank's row of A and column of B averaged over the peers that have it, scales in B: no
    zeros pull down what few peers have.

    Raises:
        ValueError: no parts, shapes that differ, or a weight that is not positive.
    """
    summed = padded_mean(parts)
    ranks = np.arange(summed.rank)
    held_R = _sum([np.where(ranks < part.rank, share, 0.0) for share, part in _shared(parts)])
    return LowRank(summed.A / held_R[:, None], summed.B / held_R)


def _shared(parts: Parts) -> list[tuple[float, LowRank]]:
    """With weights that add up to one."""
    shares = shares_of([weight for weight, _ in parts])
    if len({part.shape for _, part in parts}) != 1:
        raise ValueError("factors of layers of different shapes")
    return [(share, part) for share, (_, part) in zip(shares, parts, strict=True)]


def _sum(arrays: Sequence[Float64]) -> Float64:
    total = np.zeros_like(arrays[0])
    for array in arrays:
        total += array
    return total
