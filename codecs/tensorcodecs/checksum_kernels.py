"""XXH3's 64-bit checksum, compiled: what `frame.checksum_of` gives, without a call per frame.

Only for inputs of more than 240 bytes (`frame.COMPILED_FROM`) and without a seed. Eight sums of
64 bits run over stripes of 64 bytes; after every sixteen they are scrambled. (Collet, "XXH3", the
specification in the xxHash repository, doc/xxhash_spec.md, version 0.2.0.)
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tensorcodecs.jit import inner
from tensorcodecs.vector import _at, _load, _store, _vector, load64

_U: Final = np.uint64

_STRIPE: Final = 64
_STRIPES: Final = 16  # before the sums are scrambled
_SECRET: Final = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
        "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
        "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
        "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
        "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)
_LAST_KEY: Final = 192 - 64 - 7  # of the last stripe, which may overlap the one before
_SCRAMBLE_KEY: Final = 192 - 64
_MERGE_KEY: Final = 11
_PRIME_32: Final = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME_64: Final = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
_START: Final = np.array(
    [
        _PRIME_32[2], _PRIME_64[0], _PRIME_64[1], _PRIME_64[2],
        _PRIME_64[3], _PRIME_32[1], _PRIME_64[4], _PRIME_32[0],
    ],
    np.uint64,
)  # fmt: skip
_FIRST_PRIME: Final = np.uint64(_PRIME_64[0])
_LAST_PRIME: Final = np.uint64(0x165667919E3779F9)
_WORD: Final = ir.IntType(64)
_EIGHT: Final = _vector(_WORD, 8)


def _all(value: int) -> Any:
    return ir.Constant(_EIGHT, [value] * 8)


def _added(builder: Any, sums: Any, data: Any, key: Any) -> Any:
    """The sums after one stripe: each takes its neighbour's words, and a product of its own."""
    mixed = builder.xor(data, key)
    low = builder.and_(mixed, _all(0xFFFFFFFF))
    product = builder.mul(low, builder.lshr(mixed, _all(32)))
    swapped = ir.Constant(_vector(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])
    crossed = builder.shuffle_vector(data, data, swapped)
    return builder.add(builder.add(sums, crossed), product)


@intrinsic
def _add_stripes(
    typing: Any, data: Any, at: Any, count: Any, secret: Any, key: Any, sums: Any
) -> Any:
    """Take `count` stripes from data[at] in; the secret moves on by eight bytes with each."""
    signature = types.void(data, types.int64, types.int64, secret, types.int64, sums)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source = _at(context, builder, (sig.args[0], args[0]), args[1])
        keys = _at(context, builder, (sig.args[3], args[3]), args[4])
        place = _at(context, builder, (sig.args[5], args[5]), ir.Constant(_WORD, 0))
        held = cgutils.alloca_once_value(builder, _load(builder, place, _EIGHT, 8))
        with cgutils.for_range(builder, args[2]) as loop:
            here = builder.gep(source, [builder.mul(loop.index, ir.Constant(_WORD, _STRIPE))])
            words = _load(builder, here, _EIGHT, 1)
            there = builder.gep(keys, [builder.mul(loop.index, ir.Constant(_WORD, 8))])
            key = _load(builder, there, _EIGHT, 1)
            builder.store(_added(builder, builder.load(held), words, key), held)
        _store(builder, builder.load(held), place, 8)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _scramble(typing: Any, secret: Any, key: Any, sums: Any) -> Any:
    signature = types.void(secret, types.int64, sums)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        keys = _at(context, builder, (sig.args[0], args[0]), args[1])
        place = _at(context, builder, (sig.args[2], args[2]), ir.Constant(_WORD, 0))
        value = _load(builder, place, _EIGHT, 8)
        value = builder.xor(value, builder.lshr(value, _all(47)))
        value = builder.xor(value, _load(builder, keys, _EIGHT, 1))
        _store(builder, builder.mul(value, _all(_PRIME_32[0])), place, 8)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _folded(typing: Any, one: Any, other: Any) -> Any:
    """The halves of the product of 128 bits, one xor the other."""
    signature = types.uint64(types.uint64, types.uint64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        upper = builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), _WORD)
        return builder.xor(builder.trunc(product, _WORD), upper)

    return signature, generate


@inner
def checksum(data: Any, start: int, stop: int, sums: Any) -> np.uint32:
    """The low half of XXH3-64 of data[start:stop], more than 240 bytes. `sums`: (8,) uint64."""
    size = stop - start
    for lane in range(8):
        sums[lane] = _START[lane]
    whole = (size - 1) // (_STRIPE * _STRIPES)
    at = start
    for _ in range(whole):
        _add_stripes(data, at, _STRIPES, _SECRET, 0, sums)
        _scramble(_SECRET, _SCRAMBLE_KEY, sums)
        at += _STRIPE * _STRIPES
    _add_stripes(data, at, (stop - 1 - at) // _STRIPE, _SECRET, 0, sums)
    _add_stripes(data, stop - _STRIPE, 1, _SECRET, _LAST_KEY, sums)
    result = _U(size) * _FIRST_PRIME
    for pair in range(4):
        key = _MERGE_KEY + 16 * pair
        result += _folded(
            sums[2 * pair] ^ load64(_SECRET, _U(key)),
            sums[2 * pair + 1] ^ load64(_SECRET, _U(key + 8)),
        )
    result ^= result >> _U(37)
    result *= _LAST_PRIME
    return np.uint32((result ^ (result >> _U(32))) & _U(0xFFFFFFFF))
