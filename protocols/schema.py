"""Dataclasses to bytes and back, where the bytes come from strangers.

A dataclass's annotations are its wire schema: `int`, `float`, `str`, `bytes`, `bool`, nested
dataclasses, `tuple[X, ...]` and `X | None`, each with a bound (`Annotated[str, Max(64)]`) where it
has a size. What does not fit the schema exactly raises `SchemaError`; nothing is coerced, nothing
is allocated beyond the input's own size.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Hashable
from functools import cache
from typing import Annotated, Any, Final, TypeVar, Union

import msgpack

T = TypeVar("T")

INT_MAX: Final = 2**63 - 1


class SchemaError(ValueError):
    """The bytes are not what the schema says; the text names the field."""


@dataclasses.dataclass(frozen=True, slots=True)
class Max:
    """At most `limit` characters, bytes or items; for a number, at most this value."""

    limit: int


@dataclasses.dataclass(frozen=True, slots=True)
class Exactly:
    """Exactly `length` bytes."""

    length: int


_Check = Callable[[Any], Any]


class _MisfitError(SchemaError):
    """Where and what, the way there put together as the error rises: it is seldom needed."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        self.where = ""

    def inside(self, step: str) -> _MisfitError:
        self.where = step + self.where
        return self


def pack(value: Any) -> bytes:
    """Canonical bytes of a dataclass instance: a msgpack array of its fields in order."""
    return typing.cast("bytes", msgpack.packb(value, use_bin_type=True, default=_row))


def unpack(kind: type[T], data: bytes) -> T:
    """The instance of `kind` that `data` holds.

    Raises:
        SchemaError: `data` is not exactly one well-formed `kind`.
    """
    try:
        raw = msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            strict_map_key=True,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=len(data),
            max_bin_len=len(data),
            # A list is made before it fills: nested ones of declared lengths would be a bomb.
            max_array_len=_items_max(typing.cast("Any", kind)),
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise SchemaError(f"{kind.__name__}: not msgpack ({error})") from None
    try:
        return typing.cast("T", _checker(typing.cast("Any", kind))(raw))
    except _MisfitError as error:
        raise SchemaError(f"{kind.__name__}{error.where}: {error.what}") from None


def _row(value: Any) -> list[Any]:
    """A dataclass instance as msgpack should see it: it knows tuples by itself."""
    return [getattr(value, name) for name in _names(typing.cast("Hashable", type(value)))]


@cache
def _names(kind: Any) -> tuple[str, ...]:
    """A dataclass's fields."""
    return tuple(f.name for f in dataclasses.fields(kind))


@cache
def _items_max(hint: Any) -> int:
    """The most items that any list inside a value of type `hint` may have."""
    hint = getattr(hint, "__supertype__", hint)
    if typing.get_origin(hint) is Annotated:
        inner, *extras = typing.get_args(hint)
        is_list = typing.get_origin(inner) is tuple
        limits: list[int] = [x.limit for x in extras if is_list and isinstance(x, Max)]
        return max([_items_max(inner), *limits])
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint, include_extras=True)
        return max([len(hints), *(_items_max(inner) for inner in hints.values())])
    return max((_items_max(inner) for inner in typing.get_args(hint)), default=0)


@cache
def _checker(hint: Any) -> _Check:
    """Compile a type annotation into a function (value, where) -> value that raises SchemaError."""
    bound: Max | Exactly | None = None
    while typing.get_origin(hint) is Annotated:
        hint, *extras = typing.get_args(hint)
        bound = next((x for x in extras if isinstance(x, Max | Exactly)), bound)
    hint = getattr(hint, "__supertype__", hint)  # NewType
    while typing.get_origin(hint) is Annotated:
        hint, *extras = typing.get_args(hint)
        bound = next((x for x in extras if isinstance(x, Max | Exactly)), bound)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass_checker(hint)
    origin = typing.get_origin(hint)
    if origin is tuple:
        return _tuple_checker(typing.get_args(hint)[0], bound)
    if origin in (Union, types.UnionType):
        arms = [a for a in typing.get_args(hint) if a is not type(None)]
        inner = _checker(arms[0])
        return lambda value: None if value is None else inner(value)
    return _scalar_checker(hint, bound)


def _dataclass_checker(kind: type[Any]) -> _Check:
    hints = typing.get_type_hints(kind, include_extras=True)
    names = _names(typing.cast("Hashable", kind))
    inners = [_checker(hints[name]) for name in names]
    count = len(names)

    def check(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != count:
            raise _MisfitError(f"expected {count} fields")
        parts: list[Any] = []
        try:
            for inner, item in zip(inners, value, strict=True):
                parts.append(inner(item))
        except _MisfitError as error:
            raise error.inside(f".{names[len(parts)]}") from None
        try:
            return kind(*parts)
        except ValueError as error:  # the dataclass's own __post_init__ says no
            raise _MisfitError(str(error)) from None

    return check


def _tuple_checker(item_hint: Any, bound: Max | Exactly | None) -> _Check:
    if not isinstance(bound, Max):
        raise TypeError("a tuple field needs a Max bound")
    limit = bound.limit
    inner = _checker(item_hint)

    def check(value: Any) -> Any:
        if not isinstance(value, list):
            raise _MisfitError("expected a list")
        if len(value) > limit:
            raise _MisfitError(f"{len(value)} items, at most {limit} allowed")
        parts: list[Any] = []
        try:
            for item in value:
                parts.append(inner(item))  # noqa: PERF401  (as above)
        except _MisfitError as error:
            raise error.inside(f"[{len(parts)}]") from None
        return tuple(parts)

    return check


def _scalar_checker(hint: Any, bound: Max | Exactly | None) -> _Check:
    if hint is bool:
        return _check_bool
    if hint is float:
        return _check_float
    if hint is int:
        top = bound.limit if isinstance(bound, Max) else INT_MAX

        def check_int(value: Any) -> int:
            if type(value) is not int or not 0 <= value <= top:
                raise _MisfitError(f"expected an integer in 0..{top}")
            return value

        return check_int
    if hint in (str, bytes):
        if bound is None:
            raise TypeError(f"a {hint.__name__} field needs a bound")
        kind: type[str | bytes] = hint

        def check_sized(value: Any) -> Any:
            if type(value) is not kind:
                raise _MisfitError(f"expected {kind.__name__}")
            if isinstance(bound, Exactly) and len(value) != bound.length:
                raise _MisfitError(f"expected exactly {bound.length} bytes")
            if isinstance(bound, Max) and len(value) > bound.limit:
                raise _MisfitError(f"longer than {bound.limit}")
            return value

        return check_sized
    raise TypeError(f"no wire form for {hint!r}")


def _check_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _MisfitError("expected true or false")
    return value


def _check_float(value: Any) -> float:
    if type(value) is not float or not math.isfinite(value):
        raise _MisfitError("expected a finite number")
    return value
