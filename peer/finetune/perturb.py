"""Perturbations that a number stands for: z is a pure function of (seed, tensor's name, offset).

A zeroth-order peer sends a seed and a scalar instead of a gradient, and everybody else makes the
same direction z from the seed. So every machine must make the same bits. Here they are
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), in integers:

    key = seed (64 bits)        counter = (block, tag)       tag = first 8 bytes of SHA-256(name)

*rademacher*: z = +1 or -1, a bit each, 128 values to a block. *gaussian*: sixteen bits each,
through a table (`peer.finetune.noise`), 8 values to a block. `offset` counts a tensor's values in
C order.

What is computed is always a sum: change = sum over j of c_j * z_j in float32, in the order given,
each product and each sum rounded by itself. On the CPU compiled loops do it (`philox_kernels`), on
a GPU a Triton kernel (`philox_gpu`), elsewhere torch's integer operations (`reference`, below): the
same bits. Nothing needs a whole model's z: who changes a model asks for `CHUNK_VALUES` at a time.

Shape suffixes: J = seeds, N = values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from peer.finetune.noise import gaussian_table

Noise = Literal["gaussian", "rademacher"]
NOISES: Final[tuple[Noise, ...]] = ("gaussian", "rademacher")

CHUNK_VALUES: Final = 2**20  # 4 MiB of float32 at a time, whatever the model's size
SEED_MAX: Final = 2**64 - 1

_M0: Final = 0xD2511F53
_M1: Final = 0xCD9E8D57
_W0: Final = 0x9E3779B9
_W1: Final = 0xBB67AE85
_LOW: Final = 0xFFFFFFFF
_ROUNDS: Final = 10


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """sum over j of factors[j] * z(seeds[j]): a change of a model in 12 bytes per direction."""

    seeds: npt.NDArray[np.uint64]
    """(J,)"""
    factors: npt.NDArray[np.float32]
    """(J,), finite."""

    def __post_init__(self) -> None:
        if self.seeds.dtype != np.uint64 or self.factors.dtype != np.float32:
            raise TypeError("seeds are uint64 and factors float32")
        if self.seeds.ndim != 1 or self.seeds.shape != self.factors.shape:
            raise ValueError(f"{self.seeds.shape} seeds for {self.factors.shape} factors")
        if not np.isfinite(self.factors).all():
            raise ValueError("a factor is not finite")

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, float]]) -> Directions:
        """From (seed, factor) pairs; factors are rounded to float32."""
        seeds = np.array([seed for seed, _ in pairs], np.uint64)
        return cls(seeds, np.array([factor for _, factor in pairs], np.float32))

    def __len__(self) -> int:
        return len(self.seeds)

    def __add__(self, other: Directions) -> Directions:
        """Both, one after the other."""
        return Directions(
            np.concatenate([self.seeds, other.seeds]),
            np.concatenate([self.factors, other.factors]),
        )


NOTHING: Final = Directions.of([])


def derive_seed(*parts: int | str | bytes) -> int:
    """A seed from whatever names it: the first 8 bytes of SHA-256 over the parts."""
    digest = hashlib.sha256(b"murmuration/seed/1")
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return int.from_bytes(digest.digest()[:8], "little")


@lru_cache(maxsize=2**14)
def tag_of(name: str) -> int:
    """What a tensor's name is to the generator."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def add_change(
    out_N: torch.Tensor, directions: Directions, name: str, start: int, noise: Noise
) -> None:
    """out += sum of factor * z for the values start, start + 1, ... of the tensor `name`, in place.

    `out_N`: float32, contiguous, one-dimensional, on any device.
    """
    if not len(directions) or not out_N.numel():
        return
    if out_N.dtype != torch.float32 or out_N.dim() != 1 or not out_N.is_contiguous():
        raise ValueError("need a contiguous vector of float32")
    if out_N.device.type == "cpu":
        _on_cpu(out_N, directions, tag_of(name), start, noise)
    elif out_N.device.type == "cuda":
        from peer.finetune import philox_gpu

        philox_gpu.add_change(out_N, directions, tag_of(name), start, noise)
    else:
        reference(out_N, directions, tag_of(name), start, noise)


def z_of(
    name: str, numel: int, seed: int, noise: Noise, start: int = 0, device: str = "cpu"
) -> torch.Tensor:
    """(numel,) float32: the values start .. start + numel - 1 of one tensor's z."""
    out = torch.zeros(numel, device=device)
    add_change(out, Directions.of([(seed, 1.0)]), name, start, noise)
    return out


def expand(
    directions: Directions, name: str, shape: Sequence[int], noise: Noise
) -> npt.NDArray[np.float32]:
    """What a step comes to in one tensor, all of it: for whoever adds it to other kinds of
    change. Memory: the tensor's."""
    out = torch.zeros(math.prod(shape))
    add_change(out, directions, name, 0, noise)
    return out.numpy().reshape(shape)


def dither(name: str, numel: int, seed: int, start: int, device: torch.device) -> torch.Tensor:
    """(numel,) int32 in 0..65535: the sixteen bits of each value, for stochastic rounding."""
    if device.type == "cpu":
        from peer.finetune import philox_kernels

        out = np.empty(numel, np.int32)
        philox_kernels.halves(np.uint64(seed), np.uint64(tag_of(name)), np.uint64(start), out)
        return torch.from_numpy(out)
    if device.type == "cuda":
        from peer.finetune import philox_gpu

        return philox_gpu.dither(numel, seed, tag_of(name), start, device)
    return _halves(seed, tag_of(name), start, numel, device).to(torch.int32)


def warm_up(device: torch.device, say: Callable[[str], None]) -> None:
    """Compile or load the loops that make directions, and the table of normal values. `say`: told
    that this may take a while."""
    say("making the loops for random directions ready (a few seconds where they are new here)")
    for noise in NOISES:
        z_of("", 1, 0, noise, device=str(device))
    dither("", 1, 0, 0, device)


def chunks(numel: int) -> Iterator[tuple[int, int]]:
    """The (start, stop) by which a tensor is worked through."""
    for start in range(0, numel, CHUNK_VALUES):
        yield start, min(start + CHUNK_VALUES, numel)


# ── the same with torch's integers, on any device ────────────────────────────────────────────
def reference(
    out_N: torch.Tensor, directions: Directions, tag: int, start: int, noise: Noise
) -> None:
    """`add_change` without compiled code: the definition, about thirty times slower."""
    for seed, factor in zip(directions.seeds.tolist(), directions.factors.tolist(), strict=True):
        if noise == "gaussian":
            table = _table_on(out_N.device)
            z_N = table[_halves(seed, tag, start, out_N.numel(), out_N.device)]
        else:
            z_N = 1.0 - 2.0 * _bits(seed, tag, start, out_N.numel(), out_N.device)
        out_N += z_N * factor


@lru_cache(maxsize=8)
def _table_on(device: torch.device) -> torch.Tensor:
    return torch.tensor(gaussian_table(), device=device)


def _halves(seed: int, tag: int, start: int, count: int, device: torch.device) -> torch.Tensor:
    words = _words(seed, tag, start // 8, (start + count - 1) // 8, device)  # (blocks, 4)
    both = torch.stack([words & 0xFFFF, words >> 16], dim=2).reshape(-1)
    return both[start % 8 : start % 8 + count]


def _bits(seed: int, tag: int, start: int, count: int, device: torch.device) -> torch.Tensor:
    words = _words(seed, tag, start // 128, (start + count - 1) // 128, device)
    bits = (words[:, :, None] >> torch.arange(32, device=device)) & 1
    return bits.reshape(-1)[start % 128 : start % 128 + count]


def _words(seed: int, tag: int, first: int, last: int, device: torch.device) -> torch.Tensor:
    """(last - first + 1, 4) int64 in 0..2**32-1: the words of these counters."""
    counter = torch.arange(first, last + 1, dtype=torch.int64, device=device)
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = torch.full_like(counter, tag & _LOW)
    c3 = torch.full_like(counter, tag >> 32)
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(_ROUNDS):
        # Products wrap around at 2**64, as signed numbers too; the shift's copies of the sign go.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        )  # fmt: skip
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=1)


def _on_cpu(
    out_N: torch.Tensor, directions: Directions, tag: int, start: int, noise: Noise
) -> None:
    from peer.finetune import philox_kernels

    out: npt.NDArray[Any] = out_N.detach().numpy()
    seeds, factors = directions.seeds, directions.factors
    where = np.uint64(tag), np.uint64(start)
    if noise == "gaussian":
        philox_kernels.gaussian(seeds, factors, *where, gaussian_table(), out)
    else:
        philox_kernels.rademacher(seeds, factors, *where, out)
