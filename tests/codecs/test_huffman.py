"""The codes: as short as codes can be, canonical, and the same from both builders."""

from __future__ import annotations

import heapq
import random

import numpy as np
import pytest

from tensorcodecs import DecodeError
from tensorcodecs.ecsq import shipped_tables
from tensorcodecs.huffman import (
    ESCAPE,
    LENGTH_MAX,
    SYMBOLS,
    Table,
    byte_lengths,
    byte_table,
    level_table,
    package_merge,
    show_weights,
    shown_weights,
    table_of,
)
from tests.codecs.samples import numpy_alone


def huffman_cost(weights: list[int]) -> tuple[int, int]:
    """(sum of weight * length, longest code) of the best code without a limit, by a heap."""
    heap = [(weight, 0) for weight in weights]  # weight, depth
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        one, depth_one = heapq.heappop(heap)
        other, depth_other = heapq.heappop(heap)
        cost += one + other
        heapq.heappush(heap, (one + other, max(depth_one, depth_other) + 1))
    return cost, heap[0][1]


def best_limited_cost(weights: list[int], limit: int) -> int:
    """Of all complete codes of at most `limit` bits, by trying: weights ascend, lengths descend."""
    best = None

    def extend(lengths: list[int], room: int) -> None:
        nonlocal best
        left = len(weights) - len(lengths)
        if left == 0:
            if room == 0:
                cost = sum(w * n for w, n in zip(weights, lengths, strict=True))
                best = cost if best is None else min(best, cost)
            return
        for length in range(lengths[-1] if lengths else limit, 0, -1):
            span = 1 << (limit - length)
            if span * left > room and length == limit:
                return
            if span <= room:
                extend([*lengths, length], room - span)

    extend([], 1 << limit)
    assert best is not None
    return best


def merged(weights: list[int], limit: int) -> list[int]:
    """Lengths, from both builders alike."""
    array = np.array(weights, np.int64)
    lengths = package_merge(array, limit)
    with numpy_alone():
        assert package_merge(array, limit).tolist() == lengths.tolist()
    result: list[int] = lengths.tolist()
    assert all(1 <= length <= limit for length in result)
    assert sum(2.0**-length for length in result) == 1  # Kraft
    assert result == sorted(result, reverse=True)
    return result


def test_lengths_are_optimal_where_the_limit_does_not_bind() -> None:
    rng = random.Random(1)
    for _ in range(150):
        top = 10 ** rng.randint(0, 5)
        weights = sorted(rng.randint(1, top) for _ in range(rng.randint(2, 300)))
        cost, longest = huffman_cost(weights)
        lengths = merged(weights, max(longest, 9))
        assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == cost


def test_lengths_are_optimal_where_the_limit_binds() -> None:
    rng = random.Random(2)
    bound = 0
    for _ in range(150):
        weights = sorted(2 ** rng.randint(0, 14) for _ in range(rng.randint(2, 8)))
        limit = rng.randint(3, 5)
        lengths = merged(weights, limit)
        cost = sum(w * n for w, n in zip(weights, lengths, strict=True))
        assert cost == best_limited_cost(weights, limit)
        bound += cost > huffman_cost(weights)[0]
    assert bound > 30


def test_weights_of_any_size_and_number_have_a_code() -> None:
    """Sums of the largest weights that tables give must not overflow."""
    rng = random.Random(3)
    for count in (2, 3, 255, 256, 512, 1024, 2048, 4096):
        rare = sorted(rng.randint(2**44, 2**45) for _ in range(count - 1))
        lengths = merged([*rare, 2**60], LENGTH_MAX)
        assert lengths[-1] == 1
    assert merged([1] * 4096, LENGTH_MAX) == [12] * 4096


def check_canonical(table: Table) -> None:
    """Codes ascend with (length, symbol), and every 13 bits lead to the symbol they begin with."""
    used = np.flatnonzero(table.length_S)
    ordered = sorted(used.tolist(), key=lambda symbol: (table.length_S[symbol], symbol))
    code, before = 0, int(table.length_S[ordered[0]])
    for symbol in ordered:
        length = int(table.length_S[symbol])
        code <<= length - before
        before = length
        entry = int(table.entry_S[symbol])
        assert entry & 63 == length
        assert not entry & 0x40
        low_first = int(f"{code:0{length}b}"[::-1], 2)
        assert entry >> 9 == low_first
        following = np.arange(1 << (LENGTH_MAX - length)) << length | low_first
        assert np.all(table.lookup_W[following] == (symbol << 4 | length))
        code += 1
    assert code == 1 << before  # the last code is all ones: no 13 bits are left over


def test_codes_are_canonical() -> None:
    rng = random.Random(4)
    lengths = np.zeros(SYMBOLS, np.uint8)
    picks = rng.sample(range(SYMBOLS), 300)
    weights = np.array(sorted(rng.randint(1, 10**6) for _ in picks), np.int64)
    lengths[picks] = package_merge(weights, LENGTH_MAX)
    check_canonical(table_of(lengths))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_shipped_tables_are_canonical_and_know_the_escape(bits: int) -> None:
    tables = shipped_tables(bits).tables
    for table in tables:
        check_canonical(table)
        assert table.length_S[ESCAPE]
        without = table.length_S == 0
        escape = int(table.entry_S[ESCAPE])
        assert np.all(table.entry_S[without] == escape | 0x40)


def test_both_builders_make_the_same_tables() -> None:
    rng = random.Random(5)
    for bits in (2, 3, 4):
        for _ in range(12):
            shown = bytes(rng.randint(0, rng.choice((10, 120, 255))) for _ in range(1 << bits - 1))
            weights = shown_weights(shown)
            level_table.cache_clear()
            compiled = level_table(bits, weights)
            level_table.cache_clear()
            with numpy_alone():
                plainly = level_table(bits, weights)
            assert np.array_equal(compiled.length_S, plainly.length_S), shown.hex()
            assert np.array_equal(compiled.lookup_W, plainly.lookup_W)
            assert np.array_equal(compiled.entry_S, plainly.entry_S)
            check_canonical(compiled)
    level_table.cache_clear()


def test_a_level_table_is_near_the_entropy_of_what_it_is_for() -> None:
    weights = (65535, 44740, 14346, 2212, 170, 7, 1, 1)
    table = level_table(4, weights)
    level = np.array([weights[abs(d - 7)] for d in range(15)], float)
    level /= level.sum()
    share = np.zeros(SYMBOLS)
    for c in range(15):
        for b in range(15):
            share[np.arange(15) | b << 4 | c << 8] = level * level[b] * level[c]
    coded = table.length_S > 0
    bits = float((share * table.length_S)[coded].sum())
    bits += float(share[~coded].sum()) * (int(table.length_S[ESCAPE]) + 12)
    entropy = float(-(level * np.log2(level)).sum())
    assert entropy < bits / 3 < entropy * 1.01


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({}, "not allowed"),
        ({5: 14, 6: 1}, "not allowed"),
        ({5: 255}, "not allowed"),
        ({5: 1}, "Kraft"),
        ({5: 1, 6: 2}, "Kraft"),
        ({5: 1, 6: 1, 7: 13}, "Kraft"),
        ({5: 1, 6: 2, 7: 2, 8: 2}, "Kraft"),
    ],
)
def test_lengths_of_no_complete_code_are_refused(sizes: dict[int, int], match: str) -> None:
    lengths = np.zeros(SYMBOLS, np.uint8)
    for symbol, size in sizes.items():
        lengths[symbol] = size
    with pytest.raises(DecodeError, match=match):
        table_of(lengths)


def test_any_counts_of_bytes_have_a_table_that_travels() -> None:
    rng = np.random.default_rng(6)
    for counts in (
        np.zeros(256, np.int64),
        np.eye(1, 256, 7, dtype=np.int64)[0] * 10**9,
        rng.integers(0, 10**6, 256),
        2 ** np.arange(256, dtype=np.int64) // 8 % 2**50,
    ):
        packed = byte_lengths(counts)
        assert len(packed) == 128
        table = byte_table(packed)
        check_canonical(table)
        assert np.all(table.length_S[:256] > 0)
        assert not table.length_S[256:].any()
        with numpy_alone():
            assert byte_lengths(counts) == packed


def test_shown_weights_are_what_they_say() -> None:
    assert shown_weights(bytes([0, 8, 16, 120, 121, 255])) == (32768, 16384, 8192, 1, 1, 1)
    every = shown_weights(bytes(range(121)))
    assert list(every) == sorted(every, reverse=True)
    exact = 2.0 ** (15 - np.arange(121) / 8)
    assert np.all(np.abs(np.array(every) - np.maximum(exact, 1)) <= 1)


def test_showing_what_was_shown_changes_nothing() -> None:
    rng = random.Random(7)
    for _ in range(300):
        size = rng.choice((2, 4, 8))
        counts = [int(2 ** rng.uniform(0, 20)) * rng.randint(0, 1) for _ in range(size)]
        counts[rng.randrange(size)] += 1
        shown = show_weights(counts)
        assert len(shown) == size
        assert all(byte <= 120 for byte in shown)
        assert min(shown) == 0
        # Weights are of one sign; counts of both.
        first, *rest = shown_weights(shown)
        again = show_weights([first, *(2 * weight for weight in rest)])
        # Eighths of an octave are less than one apart where weights are small.
        assert all(b == c or b > 84 for b, c in zip(shown, again, strict=True))
        pairs = zip(shown_weights(shown), shown_weights(again), strict=True)
        assert all(abs(one - other) <= (one < 32) for one, other in pairs)
