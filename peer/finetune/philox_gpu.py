"""Perturbations on a GPU: Triton kernels that make the same bits as the CPU.

A program makes the words of some counters for one seed after another and adds what they stand for;
fused multiply-add is switched off. Triton's interpreter runs the same kernels without a GPU.

Shape suffixes: N = values, T = counters of a program.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from peer.finetune.noise import gaussian_table

if TYPE_CHECKING:
    from peer.finetune.perturb import Directions, Noise

_VALUES: Final = 1024  # of a program: a few registers in each thread
_PRECISE: Final[dict[str, Any]] = {"enable_fp_fusion": False}


def _jit(function: Any) -> Any:
    """How many values and seeds there are, and where they start, makes no other program."""
    return triton.jit(function, do_not_specialize=["first", "skip", "count", "seeds"])


@_jit
def _philox(counter_T: tl.tensor, key: tl.tensor, tag: tl.tensor) -> Any:
    low = (counter_T & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter_T >> 32) & 0xFFFFFFFF).to(tl.uint32)
    tag0 = low * 0 + (tag & 0xFFFFFFFF).to(tl.uint32)
    tag1 = low * 0 + ((tag >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(key, low, high, tag0, tag1, 10)


@_jit
def _halves(counter_T: tl.tensor, key: tl.tensor, tag: tl.tensor) -> Any:
    """(8 T,) sixteen bits each, in the order of the values."""
    w0, w1, w2, w3 = _philox(counter_T, key, tag)
    low = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # (4 T,), lane by lane
    return tl.interleave(low & 0xFFFF, low >> 16).to(tl.int32)


@_jit
def _gaussian(
    out: tl.tensor, seed: tl.tensor, factor: tl.tensor, tag: tl.tensor, table: tl.tensor,
    first: tl.tensor, skip: tl.tensor, count: tl.tensor, seeds: tl.tensor,
    counters: tl.constexpr,
) -> None:  # fmt: skip
    """out[8 * counter + i - skip] += factor * table[half i of that counter's words]."""
    begin = tl.program_id(0).to(tl.int64) * counters
    at = begin * 8 + tl.arange(0, counters * 8) - skip
    inside = (at >= 0) & (at < count)
    total = tl.load(out + at, inside, 0.0)
    name = tl.load(tag)
    for j in range(seeds):
        counter = first + begin + tl.arange(0, counters)
        bits = _halves(counter, tl.load(seed + j), name)
        total += tl.load(factor + j) * tl.load(table + bits)
    tl.store(out + at, total, inside)


@_jit
def _rademacher(
    out: tl.tensor, seed: tl.tensor, factor: tl.tensor, tag: tl.tensor,
    first: tl.tensor, skip: tl.tensor, count: tl.tensor, seeds: tl.tensor,
    counters: tl.constexpr,
) -> None:  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * counters
    bit = tl.arange(0, 32)
    at = begin * 128 + tl.arange(0, counters * 4)[:, None] * 32 + bit[None, :] - skip
    inside = (at >= 0) & (at < count)
    total = tl.load(out + at, inside, 0.0)
    name = tl.load(tag)
    for j in range(seeds):
        counter = first + begin + tl.arange(0, counters)
        w0, w1, w2, w3 = _philox(counter, tl.load(seed + j), name)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        minus = (words[:, None] >> bit[None, :].to(tl.uint32)) & 1
        total += tl.load(factor + j) * (1.0 - 2.0 * minus.to(tl.float32))
    tl.store(out + at, total, inside)


@_jit
def _dither(
    out: tl.tensor,
    seed: tl.tensor,
    tag: tl.tensor,
    first: tl.tensor,
    skip: tl.tensor,
    count: tl.tensor,
    counters: tl.constexpr,
) -> None:
    begin = tl.program_id(0).to(tl.int64) * counters
    at = begin * 8 + tl.arange(0, counters * 8) - skip
    counter = first + begin + tl.arange(0, counters)
    bits = _halves(counter, tl.load(seed), tl.load(tag))
    tl.store(out + at, bits, (at >= 0) & (at < count))


def add_change(
    out_N: torch.Tensor, directions: Directions, tag: int, start: int, noise: Noise
) -> None:
    """See `perturb.add_change`; `out_N` is where the kernels run."""
    device = out_N.device
    seeds = _integers(directions.seeds, device)
    factors = torch.from_numpy(directions.factors).to(device)
    name = _integers(np.array([tag], np.uint64), device)
    step = 8 if noise == "gaussian" else 128
    first, skip = divmod(start, step)
    programs = (triton.cdiv(skip + out_N.numel(), _VALUES),)
    where = (first, skip, out_N.numel(), len(directions))
    with torch.cuda.device_of(out_N):  # type: ignore[no-untyped-call]
        if noise == "gaussian":
            _gaussian[programs](
                out_N, seeds, factors, name, _table_on(device), *where,
                counters=_VALUES // step, **_PRECISE,
            )  # fmt: skip
        else:
            _rademacher[programs](
                out_N, seeds, factors, name, *where, counters=_VALUES // step, **_PRECISE
            )


def dither(numel: int, seed: int, tag: int, start: int, device: torch.device) -> torch.Tensor:
    """See `perturb.dither`."""
    out = torch.empty(numel, dtype=torch.int32, device=device)
    key = _integers(np.array([seed], np.uint64), device)
    name = _integers(np.array([tag], np.uint64), device)
    first, skip = divmod(start, 8)
    programs = (triton.cdiv(skip + numel, _VALUES),)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        _dither[programs](out, key, name, first, skip, numel, counters=_VALUES // 8)
    return out


def _integers(values: Any, device: torch.device) -> torch.Tensor:
    """Bits of uint64 as torch's int64, which more operations know."""
    return torch.from_numpy(values.view(np.int64).copy()).to(device)


@lru_cache(maxsize=8)
def _table_on(device: torch.device) -> torch.Tensor:
    return torch.tensor(gaussian_table(), device=device)
