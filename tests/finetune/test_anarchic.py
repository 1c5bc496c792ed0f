"""Everybody trains when they like: what the aggregator makes of it, refuses, and hands over."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest

from peer.finetune import anarchic
from peer.finetune.anarchic import (
    PEERS_MAX,
    Anarchic,
    Float32,
    Gone,
    Move,
    Push,
    PushBody,
    Pushed,
    Rule,
    Table,
    TooOld,
    make_push,
    mean_gradient,
)
from protocols import schema
from protocols.errors import RemoteProtocolError
from protocols.identity import Signer
from tensorcodecs import Layout

RUN = bytes(32)
LAYOUT = Layout.of([("w", (6, 5)), ("b", (7,))])
N = LAYOUT.numel
WORKERS = [Signer(bytes([i]) * 32) for i in range(1, 6)]
RELAY = Signer(b"\xaa" * 32).peer_id


def made(rule: Rule, *, per_step: int = 2, behind: int = 5, memory: int = 50) -> Anarchic:
    return Anarchic(
        rule, RUN, LAYOUT, per_step=per_step, versions_behind_max=behind, memory_versions=memory
    )


def push(worker: int, sequence: int, value: float | Float32, version: int = 0) -> Push:
    update_N = np.broadcast_to(np.float32(value), (N,)).copy()
    return make_push(
        WORKERS[worker], RUN, LAYOUT, update_N, sequence=sequence, version=version, steps=3
    )


def give(machine: Anarchic, *pushes: Push) -> list[Move | TooOld]:
    effects = []
    for one in pushes:
        effects += machine.handle(Pushed(RELAY, one), 0.0)
    return effects


def signed_again(one: Push, signer: Signer = WORKERS[0], **changes: Any) -> Push:
    """The same push with other claims, rightly signed."""
    body = schema.pack(dataclasses.replace(schema.unpack(PushBody, one.body), **changes))
    return Push(signer.peer_id, body, signer.sign("anarchic-push", body), one.update)


# ── what it does ─────────────────────────────────────────────────────────────────────────
def test_cd_moves_by_the_mean_of_those_who_came() -> None:
    (move,) = give(made("cd"), push(0, 1, 1.0), push(1, 1, 3.0))
    assert isinstance(move, Move)
    assert move.version == 1
    assert np.allclose(move.direction_N, 2.0, rtol=1e-3)
    assert move.peers == tuple(sorted((WORKERS[0].peer_id, WORKERS[1].peer_id)))


def test_cd_counts_who_comes_twice_twice() -> None:
    machine = made("cd", per_step=3)
    (move,) = give(machine, push(0, 1, 1.0), push(0, 2, 1.0), push(1, 1, 4.0))
    assert isinstance(move, Move)
    assert np.allclose(move.direction_N, 2.0, rtol=1e-3)


def test_cs_remembers_the_last_of_each() -> None:
    machine = made("cs")
    give(machine, push(0, 1, 1.0), push(1, 1, 4.0))
    (move,) = give(machine, push(2, 1, 7.0, 1), push(2, 2, 10.0, 1))
    assert isinstance(move, Move)
    assert np.allclose(move.direction_N, 5.0, rtol=1e-3)
    assert len(move.peers) == 3


def test_a_push_that_comes_again_counts_once() -> None:
    for rule in ("cd", "cs"):
        machine = made(rule)
        one = push(0, 1, 1.0)
        assert give(machine, one, one, one) == []
        (move,) = give(machine, push(1, 1, 3.0))
        assert isinstance(move, Move)
        assert np.allclose(move.direction_N, 2.0, rtol=1e-3)
        assert give(machine, one, push(1, 1, 3.0)) == []


def test_who_began_too_long_ago_is_told_to_begin_anew() -> None:
    machine = made("cd", per_step=1, behind=1)
    give(machine, push(0, 1, 1.0), push(0, 2, 1.0))
    assert give(machine, push(1, 1, 1.0, 0)) == [TooOld(WORKERS[1].peer_id, 2)]
    assert machine.peers == (WORKERS[0].peer_id,)
    (move,) = give(machine, push(1, 2, 1.0, 1))
    assert isinstance(move, Move)


def test_who_is_gone_counts_no_more() -> None:
    machine = made("cs", per_step=3)
    give(machine, push(0, 1, 100.0), push(1, 1, 1.0))
    machine.handle(Gone(WORKERS[0].peer_id), 0.0)
    (move,) = give(machine, push(2, 1, 3.0))
    assert isinstance(move, Move)
    assert np.allclose(move.direction_N, 2.0, rtol=1e-3)
    machine = made("cd")
    give(machine, push(0, 1, 100.0))
    machine.handle(Gone(WORKERS[0].peer_id), 0.0)
    assert give(machine, push(1, 1, 1.0)) == []  # one arrival is left, not two
    machine = made("cs")
    give(machine, push(0, 1, 100.0))
    machine.handle(Gone(WORKERS[0].peer_id), 0.0)
    assert give(machine, push(1, 1, 1.0)) == []


def test_who_was_silent_for_long_is_forgotten_and_nothing_of_it_comes_back() -> None:
    machine = made("cs", per_step=1, behind=2, memory=2)
    old = push(0, 1, 100.0)
    give(machine, old)
    for version in (1, 2, 3):
        give(machine, push(1, version, 1.0, version))
    assert machine.peers == (WORKERS[1].peer_id,)
    assert give(machine, old) == [TooOld(WORKERS[0].peer_id, 4)]


def test_the_mean_gradient_forgets_steps_and_their_length() -> None:
    rng = np.random.default_rng(0)
    start_N = rng.standard_normal(N).astype(np.float32)
    g_N = rng.standard_normal(N).astype(np.float32)
    for steps, lr in ((1, 0.5), (8, 0.25)):
        end_N = start_N - np.float32(steps * lr) * g_N
        assert np.allclose(mean_gradient(start_N, end_N, lr, steps), g_N, atol=1e-5)
    for steps, lr in ((0, 0.5), (1, 0.0), (1, float("nan"))):
        with pytest.raises(ValueError, match="steps of length"):
            mean_gradient(start_N, start_N, lr, steps)


# ── the oracle: skewed arrivals on quadratics ────────────────────────────────────────────
def _settled(rule: Rule) -> float:
    """Where x ends up, averaged: f_i = (x - c_i)^2 / 2, c = 0..3, arrivals 7:1:1:1, K from 1 to 5,
    begun up to 5 versions ago, m = 2, eta = 0.02, eta_L = 0.05, 6000 steps."""
    dice = random.Random(1)
    layout = Layout.of([("x", (1,))])
    machine = Anarchic(rule, RUN, layout, per_step=2, versions_behind_max=5, memory_versions=1000)
    past = [np.zeros(1, np.float32)]
    sequence = 0
    tail: list[float] = []
    while machine.version < 6000:
        worker = dice.choices(range(4), (7, 1, 1, 1))[0]
        behind = min(dice.randrange(6), machine.version)
        start, steps = past[-1 - behind], dice.randint(1, 5)
        x = start.copy()
        for _ in range(steps):
            x -= np.float32(0.05) * (x - np.float32(worker))
        sequence += 1
        one = make_push(
            WORKERS[worker], RUN, layout, mean_gradient(start, x, 0.05, steps),
            sequence=sequence, version=machine.version - behind, steps=steps,
        )  # fmt: skip
        for effect in machine.handle(Pushed(RELAY, one), 0.0):
            assert isinstance(effect, Move)
            past = [*past[-5:], past[-1] - np.float32(0.02) * effect.direction_N]
            tail.append(float(past[-1][0]))
    return float(np.mean(tail[3000:]))


@pytest.mark.parametrize(("rule", "theory"), [("cd", 0.6), ("cs", 1.5)])
def test_the_busy_bias_cd_and_not_cs(rule: Rule, theory: float) -> None:
    assert _settled(rule) == pytest.approx(theory, abs=0.05)


# ── handed over ──────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("rule", ["cd", "cs"])
def test_a_successor_goes_on_to_the_last_bit(rule: Rule) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        first = made(rule, per_step=3)
        sent = []
        for sequence in range(1, int(rng.integers(2, 20))):
            worker = int(rng.integers(len(WORKERS)))
            version = max(0, first.version - int(rng.integers(3)))
            values = rng.standard_normal(N).astype(np.float32)
            sent.append(push(worker, sequence, values, version))
            give(first, sent[-1])
        data = first.pack()
        assert len(data) <= first.state_bytes_max
        second = made(rule, per_step=3)
        second.take_over(RELAY, data)
        assert second.pack() == data
        assert give(second, *sent) == []  # all of it is known, or too old
        for sequence in range(20, 30):
            worker = int(rng.integers(len(WORKERS)))
            values = rng.standard_normal(N).astype(np.float32)
            one = push(worker, sequence, values, first.version)
            for a, b in zip(give(first, one), give(second, one), strict=True):
                assert isinstance(a, Move)
                assert isinstance(b, Move)
                assert a.direction_N.tobytes() == b.direction_N.tobytes(), f"seed {seed}"
                assert (a.version, a.peers) == (b.version, b.peers)


@pytest.mark.parametrize("rule", ["cd", "cs"])
def test_the_order_of_arrival_does_not_matter(rule: Rule) -> None:
    rng = np.random.default_rng(0)
    pushes = [push(i, 1, rng.standard_normal(N).astype(np.float32)) for i in range(4)]
    (one,) = give(made(rule, per_step=4), *pushes)
    (other,) = give(made(rule, per_step=4), *reversed(pushes))
    assert isinstance(one, Move)
    assert isinstance(other, Move)
    assert one.direction_N.tobytes() == other.direction_N.tobytes()


def test_the_table_costs_a_byte_per_value_and_peer() -> None:
    layout = Layout.of([("w", (300, 1000))])
    machine = Anarchic("cs", RUN, layout, per_step=64, versions_behind_max=1, memory_versions=9)
    rng = np.random.default_rng(0)
    for worker in WORKERS:
        values = rng.standard_normal(layout.numel).astype(np.float32)
        one = make_push(worker, RUN, layout, values, sequence=1, version=0, steps=1)
        machine.handle(Pushed(worker.peer_id, one), 0.0)
    assert len(machine.pack()) <= 1.01 * len(WORKERS) * layout.numel


# ── what strangers send ──────────────────────────────────────────────────────────────────
GOOD = push(0, 1, 1.0)
OTHER_LAYOUT = Layout.of([("w", (6, 5)), ("c", (7,))])


def _bad_pushes() -> dict[str, Push]:
    cut = dataclasses.replace(GOOD, update=GOOD.update[:-1])
    cut_and_signed = signed_again(cut, update=hashlib.sha256(cut.update).digest())
    large = dataclasses.replace(GOOD, update=bytes(100_000))
    return {
        "a wrong signature": dataclasses.replace(GOOD, signature=bytes(64)),
        "another's signature": dataclasses.replace(GOOD, signer=WORKERS[1].peer_id),
        "no peer": dataclasses.replace(GOOD, signer="nobody"),
        "another domain": dataclasses.replace(
            GOOD, signature=WORKERS[0].sign("anarchic", GOOD.body)
        ),
        "no body": Push(
            WORKERS[0].peer_id, b"", WORKERS[0].sign("anarchic-push", b""), GOOD.update
        ),
        "another run": signed_again(GOOD, run=bytes([1]) * 32),
        "another layout": signed_again(GOOD, layout=OTHER_LAYOUT.digest()),
        "the future": signed_again(GOOD, version=1),
        "no step": signed_again(GOOD, steps=0),
        "another update": dataclasses.replace(GOOD, update=push(0, 1, 2.0).update),
        "no update": dataclasses.replace(GOOD, update=b""),
        "a cut update": cut_and_signed,
        "a large update": signed_again(large, update=hashlib.sha256(large.update).digest()),
    }


@pytest.mark.parametrize("name", _bad_pushes())
@pytest.mark.parametrize("rule", ["cd", "cs"])
def test_a_bad_push_is_its_senders_fault_and_changes_nothing(rule: Rule, name: str) -> None:
    machine = made(rule)
    give(machine, push(1, 1, 1.0))
    before = machine.pack()
    with pytest.raises(RemoteProtocolError) as caught:
        give(machine, _bad_pushes()[name])
    assert caught.value.peer == RELAY
    assert machine.pack() == before


def test_the_table_has_room_for_so_many_and_no_more() -> None:
    machine = made("cs", per_step=64)
    layout = Layout.of([("w", (6, 5)), ("b", (7,))])
    for i in range(PEERS_MAX + 1):
        signer = Signer(hashlib.sha256(bytes([i])).digest())
        one = make_push(signer, RUN, layout, np.ones(N, np.float32), sequence=1, version=0, steps=1)
        if i < PEERS_MAX:
            machine.handle(Pushed(RELAY, one), 0.0)
        else:
            with pytest.raises(RemoteProtocolError, match="no room"):
                machine.handle(Pushed(RELAY, one), 0.0)
    assert len(machine.peers) == PEERS_MAX


def _table(rule: Rule) -> Table:
    machine = made(rule, per_step=4)
    give(machine, push(0, 1, 1.0), push(1, 1, 2.0), push(2, 1, 3.0))
    return schema.unpack(Table, machine.pack())


def _emptied(one: Push) -> Push:
    return dataclasses.replace(one, update=b"")


BAD_TABLES: dict[str, tuple[Rule, Callable[[Table], Table]]] = {
    "another rule": ("cs", lambda t: dataclasses.replace(t, rule="cd")),
    "an unknown rule": ("cs", lambda t: dataclasses.replace(t, rule="xx")),
    "one twice": ("cs", lambda t: dataclasses.replace(t, heard=(*t.heard, t.heard[0]))),
    "one waiting twice": (
        "cd", lambda t: dataclasses.replace(t, waiting=(*t.waiting[1:], t.waiting[1]))
    ),
    "more arrivals": ("cs", lambda t: dataclasses.replace(t, arrivals=4)),
    "fewer arrivals": ("cd", lambda t: dataclasses.replace(t, arrivals=2)),
    "arrivals of nobody": ("cs", lambda t: dataclasses.replace(t, heard=())),
    "waiting with cs": ("cs", lambda t: dataclasses.replace(t, waiting=t.heard)),
    "a push from the future": (
        "cs", lambda t: dataclasses.replace(t, heard=(signed_again(GOOD, version=1), *t.heard[1:]))
    ),
    "a push long forgotten": ("cs", lambda t: dataclasses.replace(t, version=100)),
    "one never heard of": ("cd", lambda t: dataclasses.replace(t, heard=t.heard[1:])),
    "one newer than heard of": (
        "cd",
        lambda t: dataclasses.replace(
            t, waiting=tuple(
                push(0, 9, 1.0) if w.signer == GOOD.signer else w for w in t.waiting
            ),
        ),
    ),
    "a forged push": (
        "cs", lambda t: dataclasses.replace(t, heard=(_bad_pushes()["another update"],))
    ),
    "an update too many": ("cd", lambda t: dataclasses.replace(t, heard=t.waiting)),
    "an update too few": (
        "cs", lambda t: dataclasses.replace(t, heard=tuple(map(_emptied, t.heard)))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_is_its_senders_fault_and_changes_nothing(name: str) -> None:
    rule, spoil = BAD_TABLES[name]
    machine = made(rule, per_step=4)
    give(machine, push(3, 1, 1.0))
    before = machine.pack()
    with pytest.raises(RemoteProtocolError) as caught:
        machine.take_over(RELAY, schema.pack(spoil(_table(rule))))
    assert caught.value.peer == RELAY
    assert machine.pack() == before


@pytest.mark.parametrize("rule", ["cd", "cs"])
def test_bytes_that_are_no_table_are_refused_wherever_they_break(rule: Rule) -> None:
    machine = made(rule, per_step=4)
    good = schema.pack(_table(rule))
    dice = random.Random(0)
    before = machine.pack()
    broken = [b"", b"\xc0", msgpack.packb([[]] * 5), bytes(machine.state_bytes_max + 1)]
    broken += [good[: dice.randrange(len(good))] for _ in range(50)]
    for _ in range(200):
        at = dice.randrange(len(good))
        broken.append(good[:at] + bytes([good[at] ^ (1 << dice.randrange(8))]) + good[at + 1 :])
    for data in broken:
        try:
            machine.take_over(RELAY, data)
        except RemoteProtocolError:
            assert machine.pack() == before
        else:  # a flipped bit in a number that nobody signed
            table = schema.unpack(Table, data)
            assert dataclasses.replace(
                table, version=_table(rule).version, arrivals=_table(rule).arrivals
            ) == _table(rule)
            machine = made(rule, per_step=4)


def test_settings_without_meaning_are_refused() -> None:
    for changes in (
        {"rule": "ca"},
        {"per_step": 0},
        {"per_step": anarchic.ARRIVALS_MAX + 1},
        {"versions_behind_max": -1},
        {"versions_behind_max": 9, "memory_versions": 8},
        {"layout": Layout.of([])},
        {"layout": Layout.of([("w", (2**15, 2**13))])},
    ):
        settings: dict[str, Any] = {
            "rule": "cs", "run": RUN, "layout": LAYOUT, "per_step": 2,
            "versions_behind_max": 5, "memory_versions": 9,
        }  # fmt: skip
        with pytest.raises(ValueError, match=r"\w"):
            Anarchic(**(settings | changes))
    with pytest.raises(ValueError, match="steps"):
        make_push(WORKERS[0], RUN, LAYOUT, np.ones(N, np.float32), sequence=1, version=0, steps=0)
