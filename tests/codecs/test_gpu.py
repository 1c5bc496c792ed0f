"""The GPU writes the CPU's bytes and reads the CPU's values, or refuses as the CPU does.

Where there is no GPU, Triton's interpreter runs the same kernels on small chunks. Either way the
checks run in a process of their own (`python -m tests.codecs.test_gpu`): the interpreter must be
chosen before Triton is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pytest

from tensorcodecs import CHUNK_VALUES, DecodeError, Ecsq, EncodeError, plain
from tensorcodecs.frame import FIXED, HEADER, OWN, RAW, ZERO, ZSTD
from tensorcodecs.huffman import LENGTH_MAX
from tests.codecs.samples import Parts, bell, chunks, mended

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorcodecs.frame import Float32

ROOT: Final = Path(__file__).parents[2]
TRITON: Final = importlib.util.find_spec("triton") is not None
RATES: Final = (0.5, 1.0, 2.0)  # each width of levels


class Bench(NamedTuple):
    """Where the kernels run, and with what size of chunks."""

    gpu: Any
    torch: Any
    device: str
    chunk: int
    small: int
    """For what is tried many times."""

    def tensor(self, x: Float32) -> Any:
        return self.torch.from_numpy(x.copy()).to(self.device)

    def frames(self, codec: Ecsq, x: Float32, chunk: int) -> list[bytes]:
        """The CPU's."""
        return [codec.encode(x[at : at + chunk]) for at in range(0, len(x), chunk)]

    def values(self, frames: list[bytes], numel: int, chunk: int) -> Float32:
        """The CPU's."""
        out = np.full(numel, np.nan, np.float32)
        for unit, frame in enumerate(frames):
            Ecsq(1.0).decode_into(frame, out[unit * chunk : (unit + 1) * chunk])
        return out

    def same(self, tensor: Any, expected: Float32, what: object) -> None:
        got = tensor.cpu().numpy()
        wrong = np.flatnonzero(got.view(np.uint32) != expected.view(np.uint32))
        assert not len(wrong), f"{what}: value {wrong[0]} is {got[wrong[0]]}"


def samples(chunk: int, seed: int) -> Float32:
    """Chunks of all kinds, most of which suit a shipped table, and a short one."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((4, chunk)).astype(np.float32)
    octave = rng.integers(-20, 20, chunk // 256).repeat(256)
    normal[1] *= np.exp2(octave - 95).astype(np.float32)  # subnormal and zero blocks among them
    normal[2] *= np.exp2(octave + 40).astype(np.float32)
    normal[3] *= np.exp2(3 * octave - 20).astype(np.float32)  # some fall out of the scales' range
    normal[3, : chunk // 8] = 0
    few = ("bell", "zeros", "heavy tail", "noise", "largest", "rare")
    kinds = [x for kind, x in chunks(chunk, seed) if kind in few]
    return np.concatenate([*normal, *kinds, bell(1000, seed)])


# ── what is checked ──────────────────────────────────────────────────────────────────────────
def check_every_kind_of_chunk_has_the_bytes_of_the_cpu(bench: Bench) -> None:
    x = samples(bench.chunk, seed=1)
    for rate in RATES:
        codec = Ecsq(rate)
        expected = bench.frames(codec, x, bench.chunk)
        got = bench.gpu.encode_many(codec, bench.tensor(x), chunk=bench.chunk)
        same = [one == other for one, other in zip(got, expected, strict=True)]
        assert all(same), f"rate {rate}: chunk {same.index(False)} differs"
        assert sum(frame[9] == FIXED for frame in expected) > 4  # what the GPU codes itself


def check_every_kind_of_frame_has_the_values_of_the_cpu(bench: Bench) -> None:
    x = samples(bench.chunk, seed=2)
    for rate in RATES:
        frames = bench.frames(Ecsq(rate), x, bench.chunk)
        expected = bench.values(frames, len(x), bench.chunk)
        out = bench.tensor(np.full(len(x), 7, np.float32))
        bench.gpu.decode_many(frames, out, chunk=bench.chunk)
        bench.same(out, expected, f"rate {rate}")


def modes(chunk: int) -> list[bytes]:
    """Frames of all widths in all modes."""
    frames = []
    for seed, rate in enumerate(RATES):
        parts = Parts.of(Ecsq(rate), bell(chunk, seed))
        frames += [parts.frame(mode) for mode in (RAW, ZSTD, OWN, FIXED)]
        frames.append(parts.frame(FIXED, 3))
        frames.append(Ecsq(rate).zero_frame(chunk))
    return frames


def check_all_modes_and_widths_are_read_in_one_call_and_added(bench: Bench) -> None:
    chunk = bench.small
    frames = modes(chunk)
    assert {frame[9] for frame in frames} == {RAW, ZSTD, OWN, FIXED, ZERO}
    numel = len(frames) * chunk
    out = bench.tensor(np.full(numel, 7, np.float32))
    bench.gpu.decode_many([memoryview(f) for f in frames], out, chunk=chunk)
    bench.same(out, bench.values(frames, numel, chunk), "written")
    acc = bell(numel, seed=3)
    sums = bench.tensor(acc)
    for weight in (0.37, 123.456):
        for unit, frame in enumerate(frames):
            Ecsq(1.0).accumulate(frame, weight, acc[unit * chunk : (unit + 1) * chunk])
        bench.gpu.accumulate(frames, weight, sums, chunk=chunk)
    bench.same(sums, acc, "added")


def check_literals_make_the_trip(bench: Bench) -> None:
    x = np.random.default_rng(4).standard_normal(6 * bench.chunk).astype(np.float32)
    x[::97] *= 3
    codec = Ecsq(0.5)
    expected = bench.frames(codec, x, bench.chunk)
    section = Parts.of(codec, x[: bench.chunk]).section
    streams = plain.streams_of(plain.length_of(bench.chunk, 3))
    counted = [f[section + 2 * streams] | f[section + 2 * streams + 1] << 8 for f in expected]
    assert min(counted) > 20
    assert {count % 2 for count in counted} == {0, 1}  # the last byte holds one literal or two
    assert bench.gpu.encode_many(codec, bench.tensor(x), chunk=bench.chunk) == expected
    out = bench.tensor(np.zeros_like(x))
    bench.gpu.decode_many(expected, out, chunk=bench.chunk)
    bench.same(out, bench.values(expected, len(x), bench.chunk), "with literals")


def check_short_and_empty_vectors(bench: Bench) -> None:
    codec = Ecsq(1.0)
    for numel in (0, 1, bench.small - 1, bench.small, bench.small + 1):
        x = bell(numel, seed=5)
        frames = bench.gpu.encode_many(codec, bench.tensor(x), chunk=bench.small)
        assert frames == bench.frames(codec, x, bench.small), numel
        out = bench.tensor(np.zeros(numel, np.float32))
        bench.gpu.decode_many(frames, out, chunk=bench.small)
        bench.same(out, bench.values(frames, numel, bench.small), numel)


def check_a_value_that_cannot_be_sent_is_named(bench: Bench) -> None:
    numel = 2 * bench.small + 100
    bad = {0: np.nan, bench.small + 300: -np.inf, numel - 1: 2.0**64 * (1 + 2.0**-23)}
    for index, value in bad.items():
        x = bell(numel, seed=6)
        x[index] = x[-1] = value
        with pytest.raises(EncodeError, match=f"value {index} is") as caught:
            bench.gpu.encode_many(Ecsq(2.0), bench.tensor(x), chunk=bench.small)
        assert caught.value.index == index


def put(frame: bytes, at: int, word: int) -> bytes:
    return frame[:at] + (word & 0xFFFF).to_bytes(2, "little") + frame[at + 2 :]


def hostile(chunk: int, seed: int) -> list[tuple[str, bytes]]:
    """Frames that lie, with good checksums; of two bits, which are the fewest symbols."""
    rng = np.random.default_rng(seed)
    parts = Parts.of(Ecsq(2.0), rng.standard_normal(chunk).astype(np.float32))
    frame = parts.frame(FIXED)
    length = plain.length_of(chunk, 6)
    streams, each = plain.streams_of(length), plain.symbols_each(length)
    section, blocks = parts.section, plain.blocks_of(chunk)
    data = section + 2 * streams + 2
    sizes = [int(v) for v in np.frombuffer(frame, "<u2", streams, section)]
    shifted = put(put(frame, section, sizes[0] + 1), section + 2, sizes[1] - 1)
    longest = (each * LENGTH_MAX + 7) // 8
    grown = put(frame, section, longest + 1) + bytes(longest + 1 - sizes[0])
    found = [
        ("nothing wrong", frame),
        ("cut inside the streams", frame[: data + 100]),
        ("cut inside the sizes", frame[: section + 3]),
        ("cut inside the scales", frame[: HEADER.size + 10]),
        ("no body", frame[: HEADER.size]),
        ("a byte more", frame + b"\0"),
        ("a stream longer and the next shorter", shifted),
        ("sizes of 65535", put(put(frame, section, 65535), section + 2, 65535)),
        ("a stream longer than codes can be", grown),
        ("sizes of nothing", frame[:section] + bytes(2 * streams + 2)),
        ("all bits set", frame[:data] + b"\xff" * (len(frame) - data)),
        ("all bits clear", frame[:data] + bytes(len(frame) - data)),
        ("a peak too high", put(frame, HEADER.size, plain.STEP_MAX + 1)),
        ("a peak too low", put(frame, HEADER.size, plain.STEP_MIN - 1)),
        ("the highest peak", put(frame, HEADER.size, plain.STEP_MAX)),
        ("a scale too low", put(frame, HEADER.size, plain.STEP_MIN)),
        ("a level below zero", put(frame, HEADER.size + 2, -plain.UNIT - 1)),
        ("a level of zero", put(frame, HEADER.size + 2, -plain.UNIT)),
        ("zero blocks", frame[: section - blocks] + b"\xff" * blocks + frame[section:]),
        ("table 99", frame[:11] + b"\x63" + frame[12:]),
        ("mode 9", frame[:9] + b"\x09" + frame[10:]),
        ("5 bits", frame[:10] + b"\x05" + frame[11:]),
        ("3 bits", frame[:10] + b"\x03" + frame[11:]),
        ("own table", frame[:9] + b"\x03" + frame[10:]),
        ("another codec", frame[:8] + b"\x01" + frame[9:]),
    ]
    for turn in range(4):
        at = int(rng.integers(HEADER.size, len(frame)))
        bit = 1 << int(rng.integers(8))
        flipped = frame[:at] + bytes([frame[at] ^ bit]) + frame[at + 1 :]
        found.append((f"seed {seed}, turn {turn}: byte {at} ^ {bit}", flipped))

    x = rng.standard_normal(chunk).astype(np.float32)
    x[::97] *= 3
    parts = Parts.of(Ecsq(0.5), x)
    frame = parts.frame(FIXED)
    at = parts.section + 2 * plain.streams_of(plain.length_of(chunk, 3))
    literals = frame[at] | frame[at + 1] << 8
    assert literals > 4
    found += [
        ("literals", frame),
        ("literals too many", put(frame, at, literals + 2) + bytes(3)),
        ("literals too few", put(frame, at, literals - 2)[:-3]),
        ("literals all set", frame[:-4] + b"\xff" * 4),
    ]
    return [(what, mended(lie)) for what, lie in found]


def check_what_the_cpu_refuses_is_refused_and_nothing_changes(bench: Bench) -> None:
    chunk = bench.small
    good = Ecsq(2.0).encode(bell(chunk, seed=7))
    before = bell(2 * chunk, seed=8)
    refused = 0
    for what, frame in hostile(chunk, seed=9):
        expected, fault = before.copy(), ""
        Ecsq(1.0).accumulate(good, 0.5, expected[:chunk])
        try:
            Ecsq(1.0).accumulate(frame, 0.5, expected[chunk:])
        except DecodeError as error:
            fault, expected = str(error), before
        acc = bench.tensor(before)
        found = ""
        try:
            bench.gpu.accumulate([good, frame], 0.5, acc, chunk=chunk)
        except DecodeError as error:
            found = str(error)
        assert bool(found) == bool(fault), f"{what}: GPU {found!r}, CPU {fault!r}"
        bench.same(acc, expected, what)
        refused += bool(fault)
    assert refused > 15


def check_damaged_and_missing_frames_are_refused(bench: Bench) -> None:
    chunk = bench.small
    frame = Ecsq(0.5).encode(bell(chunk))
    out = bench.tensor(np.full(2 * chunk, 7, np.float32))
    for payloads, match in (
        ([frame], "1 frames for"),
        ([frame, frame, frame], "3 frames for"),
        ([frame, frame[:-1]], "announces"),
        ([frame, frame[:5]], "too few"),
        ([frame, frame[:-1] + bytes([frame[-1] ^ 1])], "checksum"),
        ([frame, Ecsq(0.5).encode(bell(chunk - 1))], "expected"),
    ):
        with pytest.raises(DecodeError, match=match):
            bench.gpu.decode_many(payloads, out, chunk=chunk)
    assert bool((out == 7).all())


def check_other_tensors_are_refused(bench: Bench) -> None:
    torch = bench.torch
    codec = Ecsq(0.5)
    for x in (
        torch.zeros(8, dtype=torch.float64, device=bench.device),
        torch.zeros((2, 4), device=bench.device),
        torch.zeros(8, device=bench.device)[::2],
    ):
        with pytest.raises(ValueError, match="contiguous float32 vector"):
            bench.gpu.encode_many(codec, x)
        with pytest.raises(ValueError, match="contiguous float32 vector"):
            bench.gpu.decode_many([b""], x)
        with pytest.raises(ValueError, match="contiguous float32 vector"):
            bench.gpu.accumulate([b""], 1.0, x)
    for chunk in (0, 256, 2 * CHUNK_VALUES):
        with pytest.raises(ValueError, match="multiple of 3072"):
            bench.gpu.encode_many(codec, torch.zeros(8, device=bench.device), chunk=chunk)


CHECKS: Final[dict[str, Callable[[Bench], None]]] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


# ── for a Hopper, without one ────────────────────────────────────────────────────────────────
_TYPES: Final = {
    "*fp32": "x inverse_B book_G scale_B",
    "*i16": "symbol_T literal_T lookup_TW",
    "*i32": "step_B cost_TL info_U entry_TS word_S bits_S literals_S word table_G unit_G fault",
    "*i64": "symbol4_T start_U section_G stop_G body_G",
    "*u8": "side_U byte_S out byte",
    "i32": "units words",
    "fp32": "share reach weight",
}


def compile_kernels() -> str:
    """The machine code's assembly of all kernels for an H100, for full chunks of 4-bit levels."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tensorcodecs import gpu_levels, gpu_streams

    types = {name: kind for kind, names in _TYPES.items() for name in names.split()}
    fixed = {
        "CHUNK": CHUNK_VALUES, "BITS": 4, "BLOCKS": CHUNK_VALUES // 256, "BLOCKS_MAX": 512,
        "SAMPLES_MAX": 16, "TABLES": 7, "TABLES_MAX": 8, "INFO": 12, "EACH": 2048, "STREAMS": 16,
        "PITCH": 832, "LANES": 32, "SIDE": 400, "SIDE_MAX": 512, "STEP": 256, "TILE": 2048,
        "ADD": True,
    }  # fmt: skip
    found = []
    for name, kernel in (vars(gpu_levels) | vars(gpu_streams)).items():
        if not name.endswith("_kernel"):
            continue
        rows = 16 if name == "scale_kernel" else 4
        constants = {k: v for k, v in (fixed | {"ROWS": rows}).items() if k in kernel.arg_names}
        signature = {k: "constexpr" if k in constants else types[k] for k in kernel.arg_names}
        if name == "expand_kernel":
            signature["out"] = "*fp32"
        warps = 1 if name in ("encode_kernel", "decode_kernel") else 4
        compiled = triton.compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps, "enable_fp_fusion": False},
        )
        found.append(compiled.asm["ptx"])
    return "\n".join(found)


def check_hopper_code_multiplies_and_adds_like_a_cpu() -> None:
    code = compile_kernels()
    assert code.count(".visible .entry") == 8
    assert set(re.findall(r"(?:mul|add|sub)\S*f32", code)) <= {"mul.rn.f32", "add.rn.f32"}
    assert not re.findall(r"(?:fma|mad|div|rcp|ex2)\S*f32|\.ftz", code)


# ── how pytest runs them ─────────────────────────────────────────────────────────────────────
def main(what: str) -> None:
    """One line of JSON per check: [name, what went wrong or ""]."""
    checks: dict[str, Callable[[], None]] = {}
    if what == "compile":
        name = check_hopper_code_multiplies_and_adds_like_a_cpu.__name__.removeprefix("check_")
        checks[name] = check_hopper_code_multiplies_and_adds_like_a_cpu
    else:
        import torch

        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            os.environ["TRITON_INTERPRET"] = "1"
        from tensorcodecs import gpu

        sizes = (CHUNK_VALUES, CHUNK_VALUES) if on_gpu else (12288, 3072)
        bench = Bench(gpu, torch, "cuda" if on_gpu else "cpu", *sizes)
        checks = {name: lambda c=check: c(bench) for name, check in CHECKS.items()}  # type: ignore[misc]
    for name, check in checks.items():
        wrong = ""
        try:
            check()
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps([name, wrong]), flush=True)


def outcomes_of(what: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.codecs.test_gpu", what],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'codecs'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of("run")


@pytest.mark.parametrize("name", CHECKS if TRITON else [])
def test_the_gpu_does_what_the_cpu_does(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "", outcomes[name]


def test_hopper_code_multiplies_and_adds_like_a_cpu() -> None:
    if TRITON:
        for wrong in outcomes_of("compile").values():
            assert not wrong, wrong


def test_a_tensor_on_the_cpu_is_refused() -> None:
    if TRITON:
        import torch

        from tensorcodecs import gpu

        with pytest.raises(ValueError, match="need a vector on a GPU, got one on cpu"):
            gpu.encode_many(Ecsq(0.5), torch.zeros(8))


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "tensorcodecs.gpu", raising=False)
    with pytest.raises(ImportError, match="pip install torch triton"):
        importlib.import_module("tensorcodecs.gpu")


def test_the_codecs_alone_import_neither_torch_nor_triton() -> None:
    code = "import sys, tensorcodecs; print({'torch', 'triton'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "codecs")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "set()"


if __name__ == "__main__":
    main(sys.argv[1])
