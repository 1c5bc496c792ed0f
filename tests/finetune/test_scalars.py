"""What a zeroth-order peer sends: small, one spelling, signed, and refused otherwise."""

from __future__ import annotations

import math
import random
import struct
from dataclasses import replace

import pytest

from peer.finetune import scalars
from peer.finetune.scalars import Scalars, decode, encode, quantise, weight_code, weight_of
from peer.finetune.seed_rules import WEIGHT_MAX, SeedRules
from protocols.errors import RemoteProtocolError
from protocols.schema import pack, unpack
from tests.finetune.seed_runs import BASE, rules, signer

HEAD = b"h" * 32
ME = signer(1)


def sent(log_rules: SeedRules, values: dict[int, float], weight: float = 5) -> bytes:
    return encode(log_rules, ME, HEAD, 70_000, weight, quantise(values))


def test_a_decomfl_round_costs_at_most_100_bytes_for_16_scalars() -> None:
    for perturbations, steps in [(1, 1), (16, 1), (4, 4), (5, 3)]:
        run = rules(perturbations=perturbations, steps=steps)
        count = perturbations * steps
        data = sent(run, {i: math.sin(i + 1) for i in range(count)})
        assert len(data) == 68 + 2 * count == scalars.entry_bytes_max(run) <= 100


def test_a_kseed_round_costs_at_most_16_400_bytes_for_4096_seeds() -> None:
    run = rules("kseed", pool=4096)
    full = sent(run, {i: 1 - i / 2500 for i in range(4096) if i != 2500} | {2500: 1.0})
    assert len(full) == 8772 == scalars.entry_bytes_max(run) <= 16_400
    rng = random.Random(0)
    drawn = {rng.randrange(4096): rng.gauss(0, 1) for _ in range(200)}
    assert len(sent(run, drawn)) == 68 + 512 + 2 * len(drawn) <= 980


@pytest.mark.parametrize("method", ["decomfl", "kseed"])
def test_what_comes_out_is_what_went_in_to_fifteen_bits(method: str) -> None:
    run, rng = rules(method), random.Random(1)
    for scale in (1e-30, 1e-3, 1.0, 9e5):
        values = {i: rng.uniform(-scale, scale) for i in range(run.scalars)}
        reading = decode(run, ME.peer_id, HEAD, 70_000, sent(run, values))
        largest = max(map(abs, values.values()))
        assert (reading.peer, reading.weight) == (ME.peer_id, 5)
        for i, value in values.items():
            assert abs(reading.scalars.get(i, 0.0) - value) <= largest * 2**-15


def test_quantising_what_was_quantised_changes_nothing() -> None:
    rng = random.Random(2)
    for _ in range(500):
        some = quantise({i: rng.gauss(0, 10 ** rng.uniform(-9, 5)) for i in range(5)})
        assert quantise(some.values()) == some


def test_values_at_the_edges() -> None:
    assert quantise({0: 0.0, 3: -0.0}) == Scalars(-127, {})
    assert quantise({0: 1.0}) == Scalars(1, {0: 2**14})
    assert quantise({0: math.nextafter(2.0, 0)}) == Scalars(2, {0: 2**14})  # rounds up to 2
    assert quantise({0: 1e-60}) == Scalars(-127, {})
    for bad in (math.nan, math.inf, -math.inf, 2.0**126):
        with pytest.raises(ValueError, match="no number"):
            quantise({0: 1.0, 1: bad})


def test_weights_are_rounded_down_by_less_than_an_eighth() -> None:
    for weight in [*range(1, 300), 12_345, 10**9, 15 << 30]:
        code = weight_code(weight)
        assert 1 <= code <= 255
        assert weight_of(code) <= weight < weight_of(code) * 9 / 8 + 1e-9
    assert [weight_code(weight_of(code)) for code in range(1, 256)] == list(range(1, 256))
    assert weight_of(255) == WEIGHT_MAX
    assert weight_code(1e300) == weight_code(math.inf) == 255
    for bad in (0, 0.5, -3, math.nan):
        with pytest.raises(ValueError, match="at least 1"):
            weight_code(bad)


def test_a_weight_counts_for_no_more_than_the_rules_say() -> None:
    run = rules(weight_max=100)
    assert decode(run, ME.peer_id, HEAD, 70_000, sent(run, {0: 1.0}, 10**9)).weight == 100


@pytest.mark.parametrize("method", ["decomfl", "kseed"])
def test_a_signature_holds_for_one_run_peer_state_round_and_content(method: str) -> None:
    run = rules(method)
    data = sent(run, {0: 1.0, 3: -0.25})
    assert decode(run, ME.peer_id, HEAD, 70_000, data).scalars == {0: 1.0, 3: -0.25}
    other_round = 70_000 + 2**16  # looks the same in the two bytes
    for what, args in {
        "peer": (run, signer(2).peer_id, HEAD, 70_000),
        "run": (replace(run, run=b"q" * 32), ME.peer_id, HEAD, 70_000),
        "lr": (replace(run, lr=run.lr * 2), ME.peer_id, HEAD, 70_000),
        "state": (run, ME.peer_id, b"g" * 32, 70_000),
        "round": (run, ME.peer_id, HEAD, other_round),
    }.items():
        with pytest.raises(RemoteProtocolError, match="wrong signature") as caught:
            decode(*args, data)
        assert caught.value.peer == args[1], what


@pytest.mark.parametrize("method", ["decomfl", "kseed"])
def test_no_changed_byte_and_no_other_length_passes(method: str) -> None:
    run = rules(method)
    data = sent(run, {i: i - 1.6 for i in range(run.scalars)})
    for at in range(len(data)):
        for flip in (1, 0x80):
            bad = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            with pytest.raises(RemoteProtocolError):
                decode(run, ME.peer_id, HEAD, 70_000, bad)
    for size in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            decode(run, ME.peer_id, HEAD, 70_000, data[:size])
    for more in (1, 2, 64):
        with pytest.raises(RemoteProtocolError):
            decode(run, ME.peer_id, HEAD, 70_000, data + bytes(more))


def forged(run: SeedRules, body: bytes) -> bytes:
    """An entry that is nonsense, but well signed."""
    return body + ME.sign(scalars.DOMAIN, scalars._signed(run, HEAD, 70_000, body))


ROUND = 70_000 % 2**16


@pytest.mark.parametrize(
    ("what", "head", "numbers"),
    [
        ("no weight", (0, 1, ROUND), (2**14, 0, 0, 0)),
        ("no such exponent", (1, -128, ROUND), (2**14, 0, 0, 0)),
        ("another round", (1, 1, ROUND + 1), (2**14, 0, 0, 0)),
        ("another spelling", (1, 1, ROUND), (2**13, 1, 0, 0)),
        ("another spelling", (1, 1, ROUND), (0, 0, 0, 0)),
        ("fifteen bits", (1, 1, ROUND), (-(2**15), 0, 0, 0)),
        ("beyond 1e", (1, 127, ROUND), (2**14, 0, 0, 0)),
    ],
)
def test_nonsense_is_refused_though_it_is_signed(
    what: str, head: tuple[int, int, int], numbers: tuple[int, ...]
) -> None:
    run = rules()
    body = struct.pack("<BbH4h", *head, *numbers)
    with pytest.raises(RemoteProtocolError, match=what):
        decode(run, ME.peer_id, HEAD, 70_000, forged(run, body))


def test_a_seed_that_was_drawn_for_nothing_is_refused() -> None:
    run = rules("kseed", pool=8)
    good = struct.pack("<BbHB2h", 1, 1, ROUND, 0b101, 2**14, -5)
    assert decode(run, ME.peer_id, HEAD, 70_000, forged(run, good)).scalars[2] == -5 * 2.0**-14
    for body, what in [
        (struct.pack("<BbHB2h", 1, 1, ROUND, 0b101, 2**14, 0), "for nothing"),
        (struct.pack("<BbHB2h", 1, 1, ROUND, 0b111, 2**14, 1), "4 bytes for 3"),
        (struct.pack("<BbHB2h", 1, 1, ROUND, 0b001, 2**14, 1), "4 bytes for 1"),
    ]:
        with pytest.raises(RemoteProtocolError, match=what):
            decode(run, ME.peer_id, HEAD, 70_000, forged(run, body))


def test_a_peer_refuses_to_send_what_others_would_refuse() -> None:
    run = rules(scalar_max=10.0)
    with pytest.raises(ValueError, match="beyond 10"):
        sent(run, {0: 11.0})
    with pytest.raises(ValueError, match="no place"):
        sent(run, {4: 1.0})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"method": "other"}, "method"), ({"noise": "cauchy"}, "noise"), ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"), ({"eps": math.inf}, "eps"), ({"pool": 8}, "pool"),
        ({"steps": 1024}, "steps"), ({"master": "fp16"}, "master"), ({"weight_max": 0}, "weight"),
        ({"reduction": "krum"}, "reduction"), ({"form": "backward"}, "form"),
        ({"method": "kseed", "perturbations": 1, "pool": 12}, "eights"),
        ({"method": "kseed", "perturbations": 2, "pool": 8}, "kseed"),
        ({"method": "kseed", "perturbations": 1, "pool": 8, "reduction": "median"}, "means"),
    ],
)  # fmt: skip
def test_rules_that_make_no_run_are_refused(changes: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        rules(**changes)  # type: ignore[arg-type]


def test_rules_travel_and_every_field_is_in_their_hash() -> None:
    run = rules("kseed")
    assert unpack(SeedRules, pack(run)) == run
    changes: list[dict[str, object]] = [
        {"run": b"x" * 32}, {"base": BASE[::-1]}, {"seed": 8}, {"noise": "rademacher"},
        {"master": "bf16"}, {"form": "forward"}, {"pool": 72}, {"lr": 1.0}, {"eps": 1.0},
        {"trim_percent": 1}, {"weight_max": 1}, {"scalar_max": 1.0},
    ]  # fmt: skip
    hashes = {run.genesis, *(replace(run, **c).genesis for c in changes)}  # type: ignore[arg-type]
    assert len(hashes) == 1 + len(changes)
