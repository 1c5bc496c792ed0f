"""What does not fit a schema exactly is refused, and costs no more than its own bytes."""

from __future__ import annotations

import math
import random
import struct
import tracemalloc
from dataclasses import dataclass
from typing import Annotated, Any

import msgpack
import pytest

from protocols.messages import Plan
from protocols.schema import INT_MAX, Exactly, Max, SchemaError, pack, unpack
from tests.protocols.samples import HEADERS, MESSAGES, sample


@dataclass(frozen=True, slots=True)
class Inner:
    flag: bool
    share: float


@dataclass(frozen=True, slots=True)
class Outer:
    """One field of every form."""

    number: int
    small: Annotated[int, Max(9)]
    name: Annotated[str, Max(3)]
    blob: Annotated[bytes, Max(3)]
    key: Annotated[bytes, Exactly(2)]
    inners: Annotated[tuple[Inner, ...], Max(2)]
    maybe: Annotated[int, Max(9)] | None

    def __post_init__(self) -> None:
        if self.name == "no":
            raise ValueError("that is no name")


GOOD: list[Any] = [7, 9, "abc", b"abc", b"ab", [[True, 0.5], [False, -0.0]], None]


def raw(position: int, value: Any) -> bytes:
    """GOOD with one field replaced, as bytes."""
    fields = list(GOOD)
    fields[position] = value
    return bytes(msgpack.packb(fields, use_bin_type=True))


def test_a_value_comes_back_as_it_was() -> None:
    value = Outer(INT_MAX, 0, "é漢🐦", b"", b"\x00\xff", (Inner(True, 1e-300),), 9)
    assert unpack(Outer, pack(value)) == value
    for kind in (*MESSAGES, *HEADERS):
        for seed in range(50):
            value = sample(kind, random.Random(seed))
            assert unpack(kind, pack(value)) == value, f"{kind.__name__}, seed {seed}"


def test_the_bytes_of_a_value_are_always_the_same() -> None:
    for seed in range(200):
        plan = sample(Plan, random.Random(seed))
        data = pack(plan)
        assert pack(unpack(Plan, data)) == data, f"seed {seed}"


NO_INT: list[Any] = [-1, 2**63, 2**64 - 1, True, False, 1.0, "1", b"1", None, [], {}, [1]]
NO_FLAG: list[Any] = [0, 1, None, "true", 1.0, b"", []]
NO_FLOAT: list[Any] = [math.nan, math.inf, -math.inf, 1, 0, True, "0.5", None, [0.5]]


@pytest.mark.parametrize(
    ("position", "values"),
    [
        (0, NO_INT),
        (1, [*NO_INT, 10]),
        (2, ["abcd", b"abc", 5, True, None, ["a"], {}, "no"]),
        (3, [b"abcd", "abc", 5, None, [1, 2], {}]),
        (4, [b"a", b"abc", b"", "ab", None, [1, 2]]),
        (5, [[[True, 0.5]] * 3, None, 5, {}, b"", "", [[True]], [[True, 0.5, 1]], [None], [[]]]),
        (5, [[[flag, 0.5]] for flag in NO_FLAG]),
        (5, [[[True, share]] for share in NO_FLOAT]),
        (6, [10, -1, True, False, 1.0, "1", [], {}, 2**64 - 1]),
    ],
)
def test_each_form_refuses_what_is_not_exactly_of_it(position: int, values: list[Any]) -> None:
    unpack(Outer, raw(0, 7))
    for value in values:
        with pytest.raises(SchemaError, match="Outer"):
            unpack(Outer, raw(position, value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",  # never used
        b"\x80",  # an empty map
        b"\x81\x00\x00",
        bytes(msgpack.packb(dict(enumerate(GOOD)))),
        bytes(msgpack.packb(GOOD[:-1])),
        bytes(msgpack.packb([*GOOD, None])),
        bytes(msgpack.packb([GOOD])),
        raw(0, 7) + b"\xc0",
        raw(0, 7) * 2,
        raw(2, "abc").replace(b"\xa3abc", b"\xa3a\xff\xfe"),  # no UTF-8
        raw(2, "abc").replace(b"\xa3abc", b"\xa3\xed\xa0\x80"),  # half a surrogate pair
        raw(0, msgpack.Timestamp(1, 2)),
        raw(0, msgpack.ExtType(5, b"")),
        raw(3, msgpack.ExtType(5, b"abc")),
        b"\xdb\xff\xff\xff\xffabc",  # a string of 4 GiB
        b"\xc6\xff\xff\xff\xffabc",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x05",
        b"\x91" * 100_000,
        b"\x90" * 1000,
    ],
    ids=range(22),
)
def test_what_is_no_such_value_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(SchemaError, match="Outer"):
        unpack(Outer, data)


@pytest.mark.parametrize("size", [2**16, 2**18])
def test_lists_that_only_claim_to_be_long_cost_no_memory(size: int) -> None:
    head = b"\xdd" + struct.pack(">I", size - 16)
    for data in (head * 1000 + bytes(size - 5000), b"\xdc\xff\xfe" * (size // 3)):
        tracemalloc.start()
        try:
            with pytest.raises(SchemaError):
                unpack(Plan, data)
            assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
        finally:
            tracemalloc.stop()


def test_every_truncation_is_refused() -> None:
    data = raw(0, 2**40)
    for length in range(len(data)):
        with pytest.raises(SchemaError):
            unpack(Outer, data[:length])


@dataclass(frozen=True)
class Boundless:
    name: str


@dataclass(frozen=True)
class BoundlessList:
    items: tuple[int, ...]


@dataclass(frozen=True)
class Formless:
    table: dict[str, int]


@pytest.mark.parametrize("kind", [Boundless, BoundlessList, Formless])
def test_a_schema_without_bounds_is_our_own_bug(kind: type) -> None:
    with pytest.raises(TypeError):
        unpack(kind, b"\x91\xa0")
