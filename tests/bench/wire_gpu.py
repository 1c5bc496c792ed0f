"""The codec's speed on a GPU: what the device does alone, and with frames and checksums.

`measure`: from float32 values to coded bytes, both on the device, and back; CUDA events, medians,
values that no cache holds, and bytes and values compared with the CPU's first. `measure_frames`:
to and from frames in the host's memory, by the clock. Without a GPU there is nothing to measure.
"""

from __future__ import annotations

import importlib.util
import time
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tensorcodecs import CHUNK_VALUES, Ecsq, get_codec
from tests.bench.result import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bench.result import Progress

VALUES: Final = 64 * 2**20 // CHUNK_VALUES * CHUNK_VALUES  # whole chunks: 0.1 % less than 64 Mi
REPEATS: Final = 9
_CODECS: Final = ("q4", "low", "min")


def measure(progress: Progress) -> list[dict[str, Any]]:
    """One row per codec, or none where there is no GPU."""
    if not _has_gpu():
        return []
    rows = []
    x = _values()
    for name in _CODECS:
        progress(f"{name} on the GPU")
        rows.append(_row(name, _codec(name), x))
    return rows


def measure_frames(progress: Progress) -> list[dict[str, Any]]:
    """The same with one thread's headers, checksums and copies to and from the host."""
    if not _has_gpu():
        return []
    from tensorcodecs import gpu

    rows = []
    x = _values()
    out = x.clone()
    gigabytes = x.nbytes / 1e9
    for name in _CODECS:
        progress(f"{name} on the GPU, with frames")
        codec = _codec(name)
        frames = gpu.encode_many(codec, x)
        encode = _seconds(lambda c=codec: gpu.encode_many(c, x))  # type: ignore[misc]
        decode = _seconds(lambda f=frames: gpu.decode_many(f, out))  # type: ignore[misc]
        added = _seconds(lambda f=frames: gpu.accumulate(f, 0.5, out))  # type: ignore[misc]
        rows.append(
            {
                "codec": f"{name} with frames, {_device()}",
                "encode GB/s": gigabytes / encode,
                "decode GB/s": gigabytes / decode,
                "decode + add GB/s": gigabytes / added,
            }
        )
    return rows


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _device() -> str:
    import torch

    return torch.cuda.get_device_name()


def _codec(name: str) -> Ecsq:
    codec = get_codec(name)
    assert isinstance(codec, Ecsq)
    return codec


def _values() -> Any:
    """(VALUES,): normal, as most blocks of a pseudo-gradient are."""
    import torch

    seeded = torch.Generator(device="cuda").manual_seed(1)
    return torch.randn(VALUES, generator=seeded, device="cuda") * 1e-3


def _row(name: str, codec: Ecsq, x: Any) -> dict[str, Any]:
    import torch

    from tensorcodecs import gpu

    frames = gpu.encode_many(codec, x)
    out = torch.empty_like(x)
    gpu.decode_many(frames, out)
    error = float(torch.linalg.vector_norm(out - x) / torch.linalg.vector_norm(x))
    few = 32 * CHUNK_VALUES
    expected = np.empty(few, np.float32)
    codec.decode_many(frames[:32], expected)
    if frames[:32] != codec.encode_many(x[:few].cpu().numpy()) or not np.array_equal(
        out[:few].cpu().numpy(), expected
    ):
        raise BenchError(
            f"{name}: GPU and CPU differ; run tests/codecs/test_gpu.py on this machine"
        )
    received = gpu.Received(frames, x)

    def decode(*, add: bool) -> None:
        received.decode()
        received.expand(out, add=add)

    gigabytes = x.nbytes / 1e9
    copy = _device_seconds(lambda: out.copy_(x))
    encode = _device_seconds(lambda: gpu.code(codec, x))
    read = _device_seconds(lambda: decode(add=False))
    added = _device_seconds(lambda: decode(add=True))
    received.check()
    return {
        "codec": f"{name}, {_device()}",
        "bits/value": 8 * sum(map(len, frames)) / VALUES,
        "error": error,
        "encode GB/s": gigabytes / encode,
        "decode GB/s": gigabytes / read,
        "decode + add GB/s": gigabytes / added,
        "encode x memcpy": copy / encode,
        "decode x memcpy": copy / read,
        "add x memcpy": copy / added,
    }


def _device_seconds(work: Callable[[], Any]) -> float:
    """Median by CUDA events, after two runs that are not counted."""
    import torch

    taken: list[float] = []
    event: Any = torch.cuda.Event
    busy: Any = torch.cuda._sleep
    for turn in range(REPEATS + 2):
        begin, end = event(enable_timing=True), event(enable_timing=True)
        busy(5_000_000)  # cycles, while Python asks for the work: its own gaps are not counted
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if turn >= 2:
            taken.append(begin.elapsed_time(end) / 1e3)
    return median(taken)


def _seconds(work: Callable[[], Any]) -> float:
    """Median by the clock, after one run that is not counted."""
    import torch

    taken = []
    for turn in range(REPEATS + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if turn:
            taken.append(time.perf_counter() - begun)
    return median(taken)
