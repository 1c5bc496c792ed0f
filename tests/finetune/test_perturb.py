"""A perturbation is a pure function of (seed, name, offset), whoever computes it and how.

The GPU's kernels run in a process of their own (`python -m tests.finetune.test_perturb`), in
Triton's interpreter where there is no GPU: it must be chosen before Triton is imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch

from peer.finetune import perturb
from peer.finetune.changes import Dense, Expanded
from peer.finetune.noise import gaussian_table
from peer.finetune.perturb import Directions, add_change, derive_seed, tag_of, z_of

ROOT: Final = Path(__file__).parents[2]
TRITON: Final = importlib.util.find_spec("triton") is not None
KINDS: Final[tuple[perturb.Noise, ...]] = ("gaussian", "rademacher")
STARTS: Final = (0, 1, 7, 127, 2049, 32769, 2**35 + 3)
NUMELS: Final = (1, 5, 128, 2048, 40_000)

KNOWN_ANSWERS: Final = [  # Random123's kat_vectors, philox4x32-10: counter, key, words
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def together(words: list[int]) -> int:
    return words[0] | words[1] << 32


def some(count: int, seed: int = 3) -> Directions:
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal(count).astype(np.float32)
    return Directions(rng.integers(0, 2**64, count, np.uint64), factors)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    c, k = words_of(counter), words_of(key)
    first = together(c[:2])
    # torch has no unsigned range: the counter with all bits set is -1 there, the same bits.
    first -= 2**64 if first >= 2**63 else 0
    words = perturb._words(together(k), together(c[2:]), first, first, torch.device("cpu"))
    assert words[0].tolist() == words_of(expected)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("noise", KINDS)
def test_the_compiled_loops_are_the_definition_bit_for_bit(
    noise: perturb.Noise, start: int
) -> None:
    for numel in NUMELS:
        begin = torch.linspace(-1, 1, numel)
        fast, slow = begin.clone(), begin.clone()
        add_change(fast, some(3), "a.weight", start, noise)
        perturb.reference(slow, some(3), tag_of("a.weight"), start, noise)
        assert torch.equal(fast.view(torch.int32), slow.view(torch.int32)), (numel, start)


@pytest.mark.parametrize("start", STARTS)
def test_dither_is_the_same_sixteen_bits_that_gaussians_are_made_of(start: int) -> None:
    got = perturb.dither("w", 5000, 77, start, torch.device("cpu"))
    slow = perturb._halves(77, tag_of("w"), start, 5000, torch.device("cpu"))
    assert torch.equal(got.long(), slow)
    z = torch.from_numpy(gaussian_table().copy())[got.long()]
    assert torch.equal(z, z_of("w", 5000, 77, "gaussian", start))


@pytest.mark.parametrize("noise", KINDS)
def test_a_tensor_in_pieces_is_the_tensor_in_one(noise: perturb.Noise) -> None:
    whole = z_of("layer.3", 10_000, 99, noise)
    cuts = [0, 1, 130, 4097, 9999, 10_000]
    pieces = [z_of("layer.3", b - a, 99, noise, start=a) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("noise", KINDS)
def test_seeds_names_and_offsets_all_matter(noise: perturb.Noise) -> None:
    z = [
        z_of("a", 4096, 1, noise), z_of("b", 4096, 1, noise), z_of("a", 4096, 2, noise),
        z_of("a", 4096, 1 + 2**63, noise), z_of("a", 4096, 1, noise, start=4096),
    ]  # fmt: skip
    for i, one in enumerate(z):
        for other in z[:i]:
            assert abs(float(one @ other)) / 4096 < 5 / 64  # five sigma of independent ones


@pytest.mark.parametrize("noise", KINDS)
def test_the_values_have_the_moments_of_their_kind(noise: perturb.Noise) -> None:
    z = z_of("m", 2**20, 5, noise).double()
    fourth = 2.9992 if noise == "gaussian" else 1.0
    assert abs(float(z.mean())) < 5 / 2**10
    assert abs(float((z**2).mean()) - 1) < 5 * (fourth - 1) ** 0.5 / 2**10 + 1e-6
    assert abs(float((z**4).mean()) - fourth) < 5 * 10 / 2**10
    assert abs(float((z[1:] * z[:-1]).mean())) < 5 / 2**10


def test_the_table_is_normal_and_of_unit_variance() -> None:
    table = np.sort(gaussian_table().astype(np.float64))
    assert abs((table**2).mean() - 1) < 1e-6
    assert np.array_equal(table, -table[::-1])
    assert np.array_equal(table * 2**12, np.rint(table * 2**12))  # exact on their grid
    from statistics import NormalDist

    share = (np.arange(0, 65536, 97) + 0.5) / 65536
    exact = np.array([NormalDist().inv_cdf(p) for p in share])
    assert np.abs(table[::97] - exact).max() < 2e-4


def test_what_a_seed_means_never_changes() -> None:
    """Golden: a change here makes every seed log unreadable."""
    digest = hashlib.sha256()
    for noise in KINDS:
        for start in STARTS:
            z = z_of("model.layers.0.mlp.up_proj.weight", 1000, 2**40 + 17, noise, start)
            digest.update(z.numpy().astype("<f4").tobytes())
    digest.update(derive_seed("run", 7, b"x").to_bytes(8, "little"))
    assert digest.hexdigest() == "2344fa81f80e0252c9be5d5f61081b72235967ee74740415dbda8e4da7bd7f32"


def test_a_sum_of_directions_is_added_in_their_order() -> None:
    directions = some(20)
    out = torch.zeros(3000)
    add_change(out, directions, "w", 0, "gaussian")
    slow = torch.zeros(3000)
    for seed, factor in zip(directions.seeds.tolist(), directions.factors.tolist(), strict=True):
        slow += z_of("w", 3000, seed, "gaussian") * factor
    assert torch.equal(out, slow)
    both = torch.zeros(3000)
    for piece in (slice(0, 7), slice(7, None)):
        part = Directions(directions.seeds[piece], directions.factors[piece])
        add_change(both, part, "w", 0, "gaussian")
    assert torch.equal(out, both)


def test_a_step_can_be_had_as_a_dense_change_beside_other_kinds() -> None:
    def made() -> Dense:
        return Dense(perturb.expand(some(5), "layer.weight", (6, 40), "gaussian"))

    change = Expanded(made, (6, 40)).made()
    assert isinstance(change, Dense)
    flat = torch.zeros(240)
    add_change(flat, some(5), "layer.weight", 0, "gaussian")
    assert np.array_equal(change.dense(), flat.numpy().reshape(6, 40).astype(np.float64))


def test_factors_that_are_no_numbers_are_refused() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            Directions.of([(1, bad)])
    with pytest.raises(ValueError, match="seeds for"):
        Directions(np.zeros(2, np.uint64), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="contiguous vector of float32"):
        add_change(torch.zeros(4, dtype=torch.float64), some(1), "w", 0, "gaussian")


# ── the GPU's kernels ────────────────────────────────────────────────────────────────────────
def on_device(device: str) -> dict[str, str]:
    from peer.finetune import philox_gpu

    wrong = {}
    for noise in KINDS:
        for start in (0, 3, 130, 2**35 + 9):
            for numel in (1, 500, 3000):
                directions = some(3, seed=numel)
                begin = torch.linspace(-1, 1, numel)
                expected = begin.clone()
                perturb.reference(expected, directions, tag_of("w"), start, noise)
                got = begin.to(device)
                philox_gpu.add_change(got, directions, tag_of("w"), start, noise)
                same = torch.equal(got.cpu().view(torch.int32), expected.view(torch.int32))
                wrong[f"{noise}/{start}/{numel}"] = "" if same else "other bits"
    for start in (0, 3, 2**35 + 9):
        got = philox_gpu.dither(3000, 2**63 + 1, tag_of("w"), start, torch.device(device))
        expected = perturb.dither("w", 3000, 2**63 + 1, start, torch.device("cpu"))
        wrong[f"dither/{start}"] = "" if torch.equal(got.cpu(), expected) else "other bits"
    return wrong


def hopper_code() -> str:
    """The assembly of all kernels for an H100."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peer.finetune import philox_gpu

    types = {
        "seed": "*i64", "tag": "*i64", "factor": "*fp32", "table": "*fp32", "first": "i64",
        "skip": "i32", "count": "i32", "seeds": "i32",
    }  # fmt: skip
    found = []
    for kernel, counters, out in [
        (philox_gpu._gaussian, 128, "*fp32"), (philox_gpu._rademacher, 8, "*fp32"),
        (philox_gpu._dither, 128, "*i32"),
    ]:  # fmt: skip
        known = types | {"out": out, "counters": "constexpr"}
        signature = {name: known[name] for name in kernel.arg_names}
        compiled = triton.compile(
            ASTSource(kernel, signature, {"counters": counters}),
            target=GPUTarget("cuda", 90, 32),
            options=philox_gpu._PRECISE,
        )
        found.append(compiled.asm["ptx"])
    return "\n".join(found)


def compiled_like_a_cpu() -> dict[str, str]:
    code = hopper_code()
    floats = set(re.findall(r"(?:mul|add|sub|neg|fma|mad)\S*f32", code))
    return {
        "kernels": "" if code.count(".visible .entry") == 3 else "not all compiled",
        "rounding": "" if floats <= {"mul.rn.f32", "add.rn.f32", "sub.rn.f32"} else str(floats),
        "subnormals": "flushed" if ".ftz" in code else "",
    }


def main(what: str) -> None:
    if what == "compile":
        print(json.dumps(compiled_like_a_cpu()))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    print(json.dumps(on_device(device)))


def outcome_of(what: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.finetune.test_perturb", what],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'codecs'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_kernels_of_the_gpu_make_the_same_bits() -> None:
    if TRITON:
        wrong = outcome_of("run")
        assert len(wrong) == 27
        assert not any(wrong.values()), wrong


def test_hopper_code_multiplies_and_adds_like_a_cpu() -> None:
    if TRITON:
        wrong = outcome_of("compile")
        assert not any(wrong.values()), wrong


if __name__ == "__main__":
    main(sys.argv[1])
