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
from collections.abc import Callable
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


_Check = Callable[[Any, str], Any]


def pack(value: Any) -> bytes:
    """Canonical bytes of a dataclass instance: a msgpack array of its fields in order."""
    return typing.cast("bytes", msgpack.packb(_plain(value), use_bin_type=True))


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
    return typing.cast("T", _checker(typing.cast("Any", kind))(raw, kind.__name__))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_plain(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


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
        return lambda v, where: None if v is None else inner(v, where)
    return _scalar_checker(hint, bound)


def _dataclass_checker(kind: type[Any]) -> _Check:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = [(f.name, _checker(hints[f.name])) for f in dataclasses.fields(kind)]

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, list) or len(value) != len(fields):
            raise SchemaError(f"{where}: expected {len(fields)} fields")
        parts = [
            inner(item, f"{where}.{name}")
            for item, (name, inner) in zip(value, fields, strict=True)
        ]
        try:
            return kind(*parts)
        except ValueError as error:  # the dataclass's own __post_init__ says no
            raise SchemaError(f"{where}: {error}") from None

    return check


def _tuple_checker(item_hint: Any, bound: Max | Exactly | None) -> _Check:
    if not isinstance(bound, Max):
        raise TypeError("a tuple field needs a Max bound")
    limit = bound.limit
    inner = _checker(item_hint)

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, list):
            raise SchemaError(f"{where}: expected a list")
        if len(value) > limit:
            raise SchemaError(f"{where}: {len(value)} items, at most {limit} allowed")
        return tuple(inner(item, f"{where}[{i}]") for i, item in enumerate(value))

    return check


def _scalar_checker(hint: Any, bound: Max | Exactly | None) -> _Check:
    if hint is bool:
        return _check_bool
    if hint is float:
        return _check_float
    if hint is int:
        top = bound.limit if isinstance(bound, Max) else INT_MAX

        def check_int(value: Any, where: str) -> int:
            if type(value) is not int or not 0 <= value <= top:
                raise SchemaError(f"{where}: expected an integer in 0..{top}")
            return value

        return check_int
    if hint in (str, bytes):
        if bound is None:
            raise TypeError(f"a {hint.__name__} field needs a bound")
        kind: type[str | bytes] = hint

        def check_sized(value: Any, where: str) -> Any:
            if type(value) is not kind:
                raise SchemaError(f"{where}: expected {kind.__name__}")
            if isinstance(bound, Exactly) and len(value) != bound.length:
                raise SchemaError(f"{where}: expected exactly {bound.length} bytes")
            if isinstance(bound, Max) and len(value) > bound.limit:
                raise SchemaError(f"{where}: longer than {bound.limit}")
            return value

        return check_sized
    raise TypeError(f"no wire form for {hint!r}")


def _check_bool(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise SchemaError(f"{where}: expected true or false")
    return value


def _check_float(value: Any, where: str) -> float:
    if type(value) is not float or not math.isfinite(value):
        raise SchemaError(f"{where}: expected a finite number")
    return value
