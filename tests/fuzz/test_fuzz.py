"""Some seconds of broken frames, and that the fuzzer would notice what it looks for."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tensorcodecs import DecodeError
from tests.fuzz import __main__ as command
from tests.fuzz import judge as judges
from tests.fuzz.judge import ACCEPTED, Finding, Judge
from tests.fuzz.mutate import READERS, Mutator

if TYPE_CHECKING:
    from tensorcodecs.frame import Float32, Payload


@pytest.mark.parametrize("seed", [1, random.SystemRandom().randrange(2**32)], ids=["1", "fresh"])
def test_broken_frames_of_every_codec_are_refused_or_harmless(seed: int, tmp_path: Path) -> None:
    found = command.fuzz(12_000, seed, tmp_path)
    assert not found.findings, f"seed {seed}; the frames are in {tmp_path}"
    assert found.frames == 12_000
    assert set(found.outcomes) == set(READERS)
    for codec, counts in found.outcomes.items():
        share = counts[ACCEPTED] / sum(counts.values())
        assert 0.05 < share < 0.7, f"{codec}, seed {seed}: one outcome is hardly reached"
        assert len(counts) > 10, f"{codec}, seed {seed}: only some checks are reached"
    assert command.as_result(found, 12_000).bars[0].holds


def test_the_same_seed_breaks_frames_the_same_way() -> None:
    one, same, other = (Mutator(seed, small_only=True) for seed in (5, 5, 6))
    frames = [[mutator.frame() for _ in range(200)] for mutator in (one, same, other)]
    assert frames[0] == frames[1]
    assert frames[0] != frames[2]


class Liar:
    """A codec that keeps no promise but the one that a test asks for."""

    def __init__(
        self, decoded: float | Exception, accumulated: float | Exception, spoil: bool = False
    ) -> None:
        self._decoded, self._accumulated, self._spoil = decoded, accumulated, spoil

    def decode_into(self, payload: Payload, out: Float32) -> None:
        if isinstance(self._decoded, Exception):
            raise self._decoded
        out[:] = self._decoded

    def accumulate(self, payload: Payload, weight: float, acc: Float32) -> None:
        if isinstance(self._accumulated, Exception):
            if self._spoil:
                acc[0] = 0
            raise self._accumulated
        acc += np.float32(self._accumulated)


@pytest.mark.parametrize(
    ("liar", "match"),
    [
        (Liar(np.nan, 0), "nan"),
        (Liar(np.inf, np.inf), "inf"),
        (Liar(2.0**71, 2.0**71), "values up to"),
        (Liar(1, 2), "does not add"),
        (Liar(IndexError(), 1), "IndexError"),
        (Liar(1, MemoryError()), "MemoryError"),
        (Liar(DecodeError("no"), 1), "accumulate accepts"),
        (Liar(1, DecodeError("no")), "accumulate: no"),
        (Liar(DecodeError("no"), DecodeError("no"), spoil=True), "changed the accumulator"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_promise_is_a_finding(
    liar: Liar, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judges, "get_codec", lambda name: liar)
    judge = Judge(tmp_path / "journal")
    with pytest.raises(Finding, match=match), np.errstate(invalid="ignore"):
        judge.judge("liar", 10, b"a frame")


def test_an_honest_codec_is_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = iter(
        [Liar(1, 1), Liar(DecodeError("block 7 is 1e-3"), DecodeError("block 7 is 1e-3"))]
    )
    monkeypatch.setattr(judges, "get_codec", lambda name: next(honest))
    judge = Judge(tmp_path / "journal")
    assert judge.judge("one", 10, b"") == ACCEPTED
    assert judge.judge("other", 10, b"") == "block N is N"


TOO_FAR = """
import ctypes, json, sys
from pathlib import Path
from tests.fuzz.room import Journal, Walled
folder = Path(json.loads(sys.argv[1])["folder"])
frame = Journal(folder / "journal").put(b"q4", 5, b"the frame")
assert bytes(frame) == b"the frame"
vector = Walled(1000).vector(5)
vector[4] = 1
{touch}
"""


@pytest.mark.parametrize(
    "touch",
    [
        "import numpy; ctypes.string_at(numpy.frombuffer(frame, 'u1').ctypes.data, len(frame) + 1)",
        "ctypes.memset(vector.ctypes.data, 0, 21)",
    ],
    ids=["read", "write"],
)
def test_one_byte_too_far_is_noticed_and_the_frame_kept(
    touch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_CHILD", ("-c", TOO_FAR.format(touch=touch)))
    found = command.fuzz(1, 7, tmp_path)
    assert found.findings == [
        f"q4, 5 values: the process died: {signal.SIGSEGV.name} (7-0-end.frame)"
    ]
    assert (tmp_path / "7-0-end.frame").read_bytes() == b"the frame"


def test_a_process_that_answers_no_more_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_START_S", 0.5)
    monkeypatch.setattr(command, "_CHILD", ("-c", "import signal; signal.pause()"))
    found = command.fuzz(1, 7, tmp_path)
    assert found.findings == ["before the first frame: no answer"]


def test_the_command_says_what_it_ran_and_fails_on_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_CHILD", ("-c", "raise SystemExit(5)"))
    assert command.main(["codecs", "--frames", "3", "--seed", "9", "--keep", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "status 5" in said.out
    assert "python -m tests.fuzz codecs --frames 3 --seed 9" in said.err
