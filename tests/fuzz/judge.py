"""What must hold for one frame, whatever its bytes are.

Either both ways of reading accept it, give finite values within the documented bound and agree to
the last bit; or both raise `DecodeError`, and the accumulator is untouched. Now and then the numpy
twin reads it too, and must come to the same, and the memory that Python asked for is measured.
"""

from __future__ import annotations

import re
import time
import tracemalloc
from pathlib import Path
from typing import Final

import numpy as np

from tensorcodecs import CHUNK_VALUES, VALUE_ABS_MAX, Codec, DecodeError, get_codec
from tests.codecs.samples import numpy_alone
from tests.fuzz.room import Journal, Walled

ACCEPTED: Final = "accepted"
VALUE_CAP: Final = np.float32(64 * VALUE_ABS_MAX)
"""What readers accept at most, says `frame.VALUE_ABS_MAX`."""
TIME_CAP_S: Final = 0.05
"""For reading a frame twice, of up to CHUNK_VALUES values; the best of three tries."""
MEMORY_CAP_FIXED: Final = 2**20  # a code table of a stranger's choice, and its making
MEMORY_CAP_PER_BYTE: Final = 4
MEMORY_CAP_PER_VALUE: Final = 16
MEASURED_EVERY: Final = 1021  # prime, so that it meets every kind of frame
COMPARED_EVERY: Final = 509
_NUMBER: Final = re.compile(r"-?\b(\d+(\.\d+)?(e[+-]?\d+)?|nan|inf)\b")


class Finding(Exception):  # noqa: N818 - not an error of ours
    """A promise that a frame broke."""


class Judge:
    """Judges frames one after another; the one at hand is in the journal."""

    def __init__(self, journal: Path) -> None:
        self._journal = Journal(journal)
        self._out, self._acc = Walled(CHUNK_VALUES), Walled(CHUNK_VALUES)
        self._acc.vector(CHUNK_VALUES)[:] = 1
        self._sum = np.empty(CHUNK_VALUES, np.float32)
        self._codecs: dict[str, tuple[Codec, bytes]] = {}
        self.slowest_s = 0.0
        self.largest_bytes = 0

    @property
    def frames(self) -> int:
        """How many were judged."""
        return self._journal.count

    def judge(self, name: str, numel: int, frame: bytes) -> str:
        """ACCEPTED, or why the codec refuses it, without numbers.

        Raises:
            Finding: the frame broke a promise.
        """
        if name not in self._codecs:
            self._codecs[name] = get_codec(name), name.encode()
        codec, title = self._codecs[name]
        payload = self._journal.put(title, numel, frame)
        number = self._journal.count
        if number % MEASURED_EVERY == 0:
            return self._measured(codec, numel, payload)
        before_s = time.perf_counter()
        verdict = self._verdict(codec, numel, payload)
        spent_s = time.perf_counter() - before_s
        if spent_s > self.slowest_s:
            self.slowest_s = self._confirmed(spent_s, codec, numel, payload)
        if number % COMPARED_EVERY == 0:
            self._compare(verdict, codec, numel, payload)
        return verdict if verdict == ACCEPTED else _NUMBER.sub("N", verdict)

    def _verdict(self, codec: Codec, numel: int, payload: memoryview) -> str:
        out_N, acc_N = self._out.vector(numel), self._acc.vector(numel)
        out_N.fill(np.nan)
        verdict = ACCEPTED
        try:
            codec.decode_into(payload, out_N)
        except DecodeError as error:
            verdict = str(error)
        except Exception as error:
            raise Finding(f"decode_into: {error!r}") from error
        try:
            codec.accumulate(payload, 1.0, acc_N)
        except DecodeError as error:
            # What zstd says behind the colon depends on the size of buffers that it still had.
            if verdict.partition(":")[0] != str(error).partition(":")[0]:
                raise Finding(f"decode_into: {verdict}; accumulate: {error}") from None
            if not (acc_N == 1).all():
                acc_N.fill(1)
                raise Finding("a refused frame changed the accumulator") from None
            return verdict
        except Exception as error:
            raise Finding(f"accumulate: {error!r}") from error
        if verdict != ACCEPTED:
            raise Finding(f"accumulate accepts it, decode_into: {verdict}")
        sum_N = np.add(out_N, np.float32(1), out=self._sum[:numel])
        same = (sum_N == acc_N).all()
        acc_N.fill(1)
        if numel and not np.abs(out_N).max() <= VALUE_CAP:  # NaN is not
            raise Finding(f"values up to {np.abs(out_N).max()} were accepted")
        if not same:
            raise Finding("accumulate does not add what decode_into gives")
        return verdict

    def _confirmed(self, spent_s: float, codec: Codec, numel: int, payload: memoryview) -> float:
        """The shortest of three tries, at most: other processes use this machine too."""
        for _ in range(2):
            before_s = time.perf_counter()
            self._verdict(codec, numel, payload)
            spent_s = min(spent_s, time.perf_counter() - before_s)
        if spent_s > TIME_CAP_S:
            raise Finding(f"it took {spent_s:.3f} s")
        return max(self.slowest_s, spent_s)

    def _measured(self, codec: Codec, numel: int, payload: memoryview) -> str:
        tracemalloc.start()
        try:
            verdict = self._verdict(codec, numel, payload)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        cap = MEMORY_CAP_FIXED + MEMORY_CAP_PER_BYTE * len(payload) + MEMORY_CAP_PER_VALUE * numel
        if peak_bytes > cap:
            raise Finding(f"it took {peak_bytes} bytes of memory, {cap} are allowed")
        self.largest_bytes = max(self.largest_bytes, peak_bytes)
        return verdict if verdict == ACCEPTED else _NUMBER.sub("N", verdict)

    def _compare(self, verdict: str, codec: Codec, numel: int, payload: memoryview) -> None:
        compiled_N = self._out.vector(numel).copy()
        with numpy_alone():
            plainly = self._verdict(codec, numel, payload)
        if (plainly == ACCEPTED) != (verdict == ACCEPTED):
            raise Finding(f"compiled: {verdict}; numpy: {plainly}")
        same = self._out.vector(numel).view(np.uint32) == compiled_N.view(np.uint32)
        if verdict == ACCEPTED and not same.all():
            raise Finding("compiled and numpy give different values")
