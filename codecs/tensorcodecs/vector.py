"""Short vectors and unaligned words for the compiled kernels: what numba itself has no words for.

Each intrinsic is a few lines of LLVM with a fixed order of additions and no fused multiply-add, so
that every machine gets the same bits; only how fast differs. Looking values up in a codebook of 16
uses the permutation of AVX-512 or AVX2 where the host has it, and plain loads elsewhere.

Nothing here checks a bound: the kernels that call it have.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I8: Final = ir.IntType(8)
_I16: Final = ir.IntType(16)
_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)
_F32: Final = ir.FloatType()

GROUP: Final = 32
"""Values that one vector step handles."""
SUM_VALUES: Final = 256
"""Values that `sum_of_squares` adds up."""
_MAGIC: Final = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, ties to even


def _vector(scalar: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(scalar, count)


def _at(context: Any, builder: ir.IRBuilder, array: tuple[Any, Any], index: Any) -> Any:
    """The address of array[index]. `array`: its numba type and its value."""
    ty, value = array
    return builder.gep(context.make_array(ty)(context, builder, value).data, [index])


def _splat(builder: ir.IRBuilder, value: Any, count: int) -> Any:
    one = builder.insert_element(
        ir.Constant(_vector(value.type, count), ir.Undefined), value, ir.Constant(_I32, 0)
    )
    return builder.shuffle_vector(one, one, ir.Constant(_vector(_I32, count), [0] * count))


def _load(builder: ir.IRBuilder, pointer: Any, ty: ir.Type, align: int) -> Any:
    value = builder.load(builder.bitcast(pointer, ty.as_pointer()))
    value.align = align
    return value


def _store(builder: ir.IRBuilder, value: Any, pointer: Any, align: int) -> None:
    done = builder.store(value, builder.bitcast(pointer, value.type.as_pointer()))
    done.align = align


@intrinsic
def load64(typing: Any, array: Any, index: Any) -> Any:
    """The eight bytes from array[index] on, as a little-endian word."""
    signature = types.uint64(array, types.uint64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load(builder, _at(context, builder, (sig.args[0], args[0]), args[1]), _I64, 1)

    return signature, generate


@intrinsic
def store64(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write a little-endian word over the eight bytes from array[index] on."""
    signature = types.void(array, types.uint64, types.uint64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _store(builder, args[2], _at(context, builder, (sig.args[0], args[0]), args[1]), 1)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def leading_zeros(typing: Any, word: Any) -> Any:
    """Of a word that is not zero."""
    signature = types.uint64(types.uint64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 1))

    return signature, generate


@intrinsic
def float_bits(typing: Any, value: Any) -> Any:
    """The 32 bits of a float32."""
    signature = types.uint32(types.float32)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _I32)

    return signature, generate


@intrinsic
def bits_float(typing: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""
    signature = types.float32(types.uint32)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return signature, generate


def _prefetcher(*, write: bool) -> Any:
    """Ask for the cache line of an address, be it anybody's: it never faults."""

    @intrinsic
    def prefetch(typing: Any, address: Any) -> Any:
        signature = types.void(types.uint64)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            ty = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
            call = cgutils.get_or_insert_function(builder.module, ty, "llvm.prefetch.p0i8")
            how = [ir.Constant(_I32, value) for value in (int(write), 3 if write else 2, 1)]
            builder.call(call, [builder.inttoptr(args[0], _I8.as_pointer()), *how])
            return context.get_dummy_value()

        return signature, generate

    return prefetch


prefetch: Final = _prefetcher(write=False)
prefetch_write: Final = _prefetcher(write=True)


@intrinsic
def trailing_zeros(typing: Any, word: Any) -> Any:
    """Of a word of 64 bits that is not zero."""
    signature = types.uint64(types.uint64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return signature, generate


@intrinsic
def ones(typing: Any, word: Any) -> Any:
    """How many bits are set."""
    signature = types.int64(types.uint64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return signature, generate


@intrinsic
def sum_of_squares(typing: Any, x: Any, index: Any) -> Any:
    """Of x[index:index + 256], in float32 and in one fixed order.

    Sixteen lanes; row r of sixteen goes to partial sum r % 4; (s0 + s1) + (s2 + s3); then the
    lanes are halved, upper half onto lower.
    """
    signature = types.float32(x, types.uint64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        start = _at(context, builder, (sig.args[0], args[0]), args[1])
        sums: list[Any] = [None] * 4
        for row in range(SUM_VALUES // 16):
            here = builder.gep(start, [ir.Constant(_I32, 16 * row)])
            value = _load(builder, here, _vector(_F32, 16), 4)
            square = builder.fmul(value, value)
            before = sums[row % 4]
            sums[row % 4] = square if before is None else builder.fadd(before, square)
        total = builder.fadd(builder.fadd(sums[0], sums[1]), builder.fadd(sums[2], sums[3]))
        width = 16
        while width > 1:
            half = width // 2
            lower = ir.Constant(_vector(_I32, half), list(range(half)))
            upper = ir.Constant(_vector(_I32, half), list(range(half, width)))
            total = builder.fadd(
                builder.shuffle_vector(total, total, lower),
                builder.shuffle_vector(total, total, upper),
            )
            width = half
        return builder.extract_element(total, ir.Constant(_I32, 0))

    return signature, generate


@intrinsic
def largest_bits(typing: Any, x: Any, index: Any) -> Any:
    """The bits of the largest magnitude in x[index:index + 256]; NaN counts as largest of all."""
    signature = types.uint32(x, types.uint64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        start = _at(context, builder, (sig.args[0], args[0]), args[1])
        words = _vector(_I32, 16)
        magnitude = ir.Constant(words, [0x7FFFFFFF] * 16)

        def larger(one: Any, other: Any) -> Any:
            return builder.select(builder.icmp_unsigned(">", one, other), one, other)

        best = None
        for row in range(SUM_VALUES // 16):
            here = builder.gep(start, [ir.Constant(_I32, 16 * row)])
            value = builder.and_(_load(builder, here, words, 4), magnitude)
            best = value if best is None else larger(best, value)
        width = 16
        while width > 1:
            half = width // 2
            lower = ir.Constant(_vector(_I32, half), list(range(half)))
            upper = ir.Constant(_vector(_I32, half), list(range(half, width)))
            best = larger(
                builder.shuffle_vector(best, best, lower),
                builder.shuffle_vector(best, best, upper),
            )
            width = half
        return builder.extract_element(best, ir.Constant(_I32, 0))

    return signature, generate


def _quantiser(*, count: int, merge: bool) -> Any:
    """out[at:at + count] = (or |=) (level + top) << shift; level = rint(x * inverse) within +-top.

    Ties go to the even level.
    """

    @intrinsic
    def quantise(
        typing: Any, x: Any, index: Any, inverse: Any, top: Any, shift: Any, out: Any, at: Any
    ) -> Any:
        signature = types.void(
            x, types.uint64, types.float32, types.uint32, types.uint32, out, types.uint64
        )

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            floats, words, symbols = (_vector(t, GROUP) for t in (_F32, _I32, _I16))
            source = _at(context, builder, (sig.args[0], args[0]), args[1])
            target = _at(context, builder, (sig.args[5], args[5]), args[6])
            limit = _splat(builder, builder.uitofp(args[3], _F32), GROUP)
            lower = builder.fsub(ir.Constant(floats, [0.0] * GROUP), limit)
            factor = _splat(builder, args[2], GROUP)
            magic = ir.Constant(floats, [_MAGIC] * GROUP)
            offset = _splat(builder, args[3], GROUP)
            amount = _splat(builder, builder.trunc(args[4], _I16), GROUP)
            for part in range(0, count, GROUP):
                step = [ir.Constant(_I32, part)]
                scaled = _load(builder, builder.gep(source, step), floats, 4)
                scaled = builder.fmul(scaled, factor)
                scaled = builder.select(builder.fcmp_ordered("<", scaled, limit), scaled, limit)
                scaled = builder.select(builder.fcmp_ordered(">", scaled, lower), scaled, lower)
                level = builder.bitcast(builder.fadd(scaled, magic), words)
                level = builder.trunc(builder.add(level, offset), symbols)
                level = builder.shl(level, amount)
                here = builder.gep(target, step)
                if merge:
                    level = builder.or_(level, _load(builder, here, symbols, 2))
                _store(builder, level, here, 2)
            return context.get_dummy_value()

        return signature, generate

    return quantise


quantise_block: Final = _quantiser(count=SUM_VALUES, merge=False)
merge_block: Final = _quantiser(count=SUM_VALUES, merge=True)
quantise_group: Final = _quantiser(count=GROUP, merge=False)
merge_group: Final = _quantiser(count=GROUP, merge=True)


def _look_up(context: Any, builder: ir.IRBuilder, table: Any, index: Any) -> Any:
    """table[index & 15] for sixteen indices; `table` points at sixteen floats."""
    features = context.codegen().magic_tuple()[2]
    floats = _vector(_F32, 16)
    if "+avx512f" in features:
        ty = ir.FunctionType(floats, [floats, _vector(_I32, 16)])
        name = "llvm.x86.avx512.permvar.sf.512"
        call = cgutils.get_or_insert_function(builder.module, ty, name)
        return builder.call(call, [_load(builder, table, floats, 4), index])
    if "+avx2" in features:
        eight, words = _vector(_F32, 8), _vector(_I32, 8)
        ty = ir.FunctionType(eight, [eight, words])
        call = cgutils.get_or_insert_function(builder.module, ty, "llvm.x86.avx2.permps")
        low = _load(builder, table, eight, 4)
        high = _load(builder, builder.gep(table, [ir.Constant(_I32, 8)]), eight, 4)
        halves = []
        for part in range(2):
            chosen = ir.Constant(words, list(range(8 * part, 8 * part + 8)))
            picks = builder.shuffle_vector(index, index, chosen)
            bit = builder.and_(picks, ir.Constant(words, [8] * 8))
            upper = builder.icmp_unsigned("!=", bit, ir.Constant(words, [0] * 8))
            halves.append(
                builder.select(
                    upper, builder.call(call, [high, picks]), builder.call(call, [low, picks])
                )
            )
        both = ir.Constant(_vector(_I32, 16), list(range(16)))
        return builder.shuffle_vector(halves[0], halves[1], both)
    result = ir.Constant(floats, ir.Undefined)
    masked = builder.and_(index, ir.Constant(_vector(_I32, 16), [15] * 16))
    for lane in range(16):
        place = builder.extract_element(masked, ir.Constant(_I32, lane))
        value = _load(builder, builder.gep(table, [place]), _F32, 4)
        result = builder.insert_element(result, value, ir.Constant(_I32, lane))
    return result


def _expander(*, count: int, add: bool) -> Any:
    """out[index:index + count] = (or +=) book[symbols[at:at + count] >> shift & 15] * scale."""

    @intrinsic
    def expand(
        typing: Any, symbols: Any, at: Any, shift: Any, book: Any, out: Any, index: Any, scale: Any
    ) -> Any:
        signature = types.void(
            symbols, types.uint64, types.uint32, book, out, types.uint64, types.float32
        )

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            table = _at(context, builder, (sig.args[3], args[3]), ir.Constant(_I64, 0))
            source = _at(context, builder, (sig.args[0], args[0]), args[1])
            target = _at(context, builder, (sig.args[4], args[4]), args[5])
            factor = _splat(builder, args[6], 16)
            amount = _splat(builder, args[2], 16)
            for part in range(count // 16):
                offset = ir.Constant(_I32, 16 * part)
                packed = _load(builder, builder.gep(source, [offset]), _vector(_I16, 16), 2)
                picks = builder.lshr(builder.zext(packed, _vector(_I32, 16)), amount)
                value = builder.fmul(_look_up(context, builder, table, picks), factor)
                here = builder.gep(target, [offset])
                if add:
                    value = builder.fadd(_load(builder, here, _vector(_F32, 16), 4), value)
                _store(builder, value, here, 4)
            return context.get_dummy_value()

        return signature, generate

    return expand


expand_block: Final = _expander(count=SUM_VALUES, add=False)
add_block: Final = _expander(count=SUM_VALUES, add=True)
expand_group: Final = _expander(count=GROUP, add=False)
add_group: Final = _expander(count=GROUP, add=True)


@intrinsic
def write_lines(
    typing: Any, symbols: Any, at: Any, shift: Any, book: Any, out: Any, index: Any,
    scale: Any, following: Any, split: Any,
) -> Any:  # fmt: skip
    """As `expand_group`, past the caches: out[index] must begin a cache line.

    The last sixteen values have `scale` up to `split`, and `following` from there.
    """
    signature = types.void(
        symbols, types.uint64, types.uint32, book, out, types.uint64, types.float32,
        types.float32, types.uint32,
    )  # fmt: skip

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        table = _at(context, builder, (sig.args[3], args[3]), ir.Constant(_I64, 0))
        source = _at(context, builder, (sig.args[0], args[0]), args[1])
        target = _at(context, builder, (sig.args[4], args[4]), args[5])
        amount = _splat(builder, args[2], 16)
        lanes = ir.Constant(_vector(_I32, 16), list(range(16)))
        factor = _splat(builder, args[6], 16)
        early = builder.icmp_unsigned("<", lanes, _splat(builder, args[8], 16))
        mixed = builder.select(early, factor, _splat(builder, args[7], 16))
        past_cache = builder.module.add_metadata([ir.Constant(_I32, 1)])
        for part in range(GROUP // 16):
            offset = ir.Constant(_I32, 16 * part)
            packed = _load(builder, builder.gep(source, [offset]), _vector(_I16, 16), 2)
            picks = builder.lshr(builder.zext(packed, _vector(_I32, 16)), amount)
            value = _look_up(context, builder, table, picks)
            value = builder.fmul(value, factor if part == 0 else mixed)
            here = builder.bitcast(builder.gep(target, [offset]), value.type.as_pointer())
            done = builder.store(value, here)
            done.align = 64
            done.set_metadata("nontemporal", past_cache)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def lines_from(typing: Any, array: Any, index: Any) -> Any:
    """How many float32 after array[index] the next cache line begins: 0 to 15."""
    signature = types.uint64(array, types.uint64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _at(context, builder, (sig.args[0], args[0]), args[1])
        words = builder.lshr(builder.ptrtoint(place, _I64), ir.Constant(_I64, 2))
        return builder.and_(builder.neg(words), ir.Constant(_I64, 15))

    return signature, generate


@intrinsic
def fence(typing: Any) -> Any:
    """What was written past the caches is seen by whoever is told of it later."""
    signature = types.void()

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def address_of(typing: Any, array: Any, index: Any) -> Any:
    """Of array[index], which may lie beyond the end."""
    signature = types.uint64(array, types.uint64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(_at(context, builder, (sig.args[0], args[0]), args[1]), _I64)

    return signature, generate


@intrinsic
def copy_marks(typing: Any, source: Any, start: Any, target: Any, at: Any, mark: Any) -> Any:
    """target[at:at + 32] = source[start:start + 32], and a bit mask of which equal `mark`."""
    signature = types.uint64(source, types.uint64, target, types.uint64, types.uint16)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        here = _at(context, builder, (sig.args[0], args[0]), args[1])
        there = _at(context, builder, (sig.args[2], args[2]), args[3])
        value = _load(builder, here, _vector(_I16, GROUP), 2)
        _store(builder, value, there, 2)
        equal = builder.icmp_unsigned("==", value, _splat(builder, args[4], GROUP))
        return builder.zext(builder.bitcast(equal, _I32), _I64)

    return signature, generate


@intrinsic
def low_bits(typing: Any, word: Any, count: Any) -> Any:
    """The lowest `count` bits of a word, 1 to 63: one instruction where there is one for it."""
    signature = types.uint64(types.uint64, types.uint64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if "+bmi2" in context.codegen().magic_tuple()[2]:
            ty = ir.FunctionType(_I64, [_I64, _I64])
            name = "llvm.x86.bmi.bzhi.64"
            call = cgutils.get_or_insert_function(builder.module, ty, name)
            return builder.call(call, list(args))
        one = ir.Constant(_I64, 1)
        return builder.and_(args[0], builder.sub(builder.shl(one, args[1]), one))

    return signature, generate
