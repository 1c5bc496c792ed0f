"""Random valid values of anything that crosses the wire, made from the schemas themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import types
import typing
from functools import cache
from typing import Annotated, Any, Union

from protocols import limits, messages, schema
from protocols.blocks import BlockRange, BlockReport
from protocols.coordinates import Coordinate
from protocols.identity import Signer
from protocols.loans import MixNote
from protocols.messages import Contributor, OutcomeHeader, PartialHeader, Seat
from protocols.records import PeerRecord, Signed
from protocols.schema import Exactly, Max
from protocols.types import GroupName, PeerId, RunId

MESSAGES: tuple[type, ...] = typing.get_args(messages.Message)
HEADERS: tuple[type, ...] = typing.get_args(messages.StreamHeader)
RUN = RunId("ab" * 32)
GROUP = GroupName("site:a")
LETTERS = "aZ09 é漢🐦\x00'\"\\"


@cache
def signer(index: int) -> Signer:
    return Signer(index.to_bytes(32, "big"))


@cache
def peer(index: int) -> PeerId:
    return signer(index).peer_id


def seats(weights: list[int]) -> list[Seat]:
    return [Seat(peer(i), weight) for i, weight in enumerate(weights)]


def record(index: int, **changes: Any) -> PeerRecord:
    plain = PeerRecord(
        peer(index), RUN, GROUP, "a", (), 10_000, True, 0, 1000 + index, 50_000, 110_000
    )
    return dataclasses.replace(plain, **changes)


def coordinate(rng: random.Random) -> Coordinate:
    """Anywhere that a coordinate can be, its bounds included."""
    most_s = limits.COORDINATE_S_MAX
    x_s, y_s, z_s = (rng.choice([0.0, most_s, rng.uniform(-most_s, most_s)]) for _ in range(3))
    return Coordinate(x_s, y_s, z_s, rng.choice([0.0, most_s, 0.01]), rng.random())


def sample(hint: Any, rng: random.Random) -> Any:
    """A random value that fits `hint`, its bounds included."""
    if hint is OutcomeHeader:
        return _outcome_header(rng)
    if hint is PartialHeader:
        whole = _outcome_header(rng)
        return PartialHeader(
            RUN, GROUP, whole.round, whole.epoch, whole.span, whole.start, whole.stop,
            whole.contributors, tuple(c.peer for c in whole.contributors),
        )  # fmt: skip
    if hint is BlockReport:
        return _block_report(rng)
    if hint is Coordinate:
        return coordinate(rng)
    bound: Max | Exactly | None = None
    while typing.get_origin(hint) is Annotated or hasattr(hint, "__supertype__"):
        if hasattr(hint, "__supertype__"):
            hint = hint.__supertype__
            continue
        hint, *extras = typing.get_args(hint)
        bound = next((x for x in extras if isinstance(x, Max | Exactly)), bound)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast("type[Any]", hint), rng)
    arms = typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return sample(arms[0], rng) if rng.random() < 0.7 else None
    most = bound.limit if isinstance(bound, Max) else schema.INT_MAX
    if typing.get_origin(hint) is tuple:
        return tuple(sample(arms[0], rng) for _ in range(rng.choice([0, 1, min(most, 5)])))
    if hint is int:
        return rng.choice([0, 1, min(most, 255), most, rng.randint(0, most)])
    if hint is float:
        return rng.choice([0.0, 1.0, 1e-300, 1e15, rng.uniform(0.0, 1e6)])
    if hint is bool:
        return rng.random() < 0.5
    exact = isinstance(bound, Exactly)
    size = bound.length if isinstance(bound, Exactly) else rng.choice([0, 1, min(most, 40)])
    if hint is str:
        return "".join(rng.choices(LETTERS, k=size))
    assert hint is bytes
    assert exact or size <= most
    return rng.randbytes(size)


def _dataclass(kind: type[Any], rng: random.Random) -> Any:
    hints = typing.get_type_hints(kind, include_extras=True)
    for _ in range(1000):  # some have rules that span their fields
        with contextlib.suppress(ValueError):
            return kind(*(sample(hints[f.name], rng) for f in dataclasses.fields(kind)))
    raise AssertionError(f"no {kind.__name__} in a thousand tries")


def _outcome_header(rng: random.Random) -> OutcomeHeader:
    start = rng.randint(0, 1000)
    units = rng.randint(1, 100)
    contributors = tuple(
        Contributor(
            peer(i),
            rng.uniform(1e-9, 1e9),
            rng.choice([b"", rng.randbytes((units + 7) // 8)]),
            _block_report(rng),
        )
        for i in range(rng.randint(0, 4))
    )
    return OutcomeHeader(
        RUN, GROUP, rng.randint(0, 2**48), rng.randint(0, 2**48), rng.randint(0, 16), start,
        start + units, contributors, rng.randbytes(32), rng.randint(0, 2**48), rng.uniform(0, 60),
        rng.choice([b"", rng.randbytes(32)]),
        tuple(
            MixNote(sample(Signed, rng), start + i, start + i + 1, rng.randbytes(32))
            for i in range(rng.randint(0, min(3, units)))
        ),
    )  # fmt: skip


def _block_report(rng: random.Random) -> BlockReport:
    def ranges() -> tuple[BlockRange, ...]:
        edges = sorted(rng.sample(range(10_000), 2 * rng.choice([0, 0, 1, 5, 64])))
        return tuple(BlockRange(*edges[i : i + 2]) for i in range(0, len(edges), 2))

    left = tuple(peer(i) for i in range(rng.randint(0, 3)))
    return BlockReport(ranges(), ranges(), ranges(), rng.random() < 0.5, left)
