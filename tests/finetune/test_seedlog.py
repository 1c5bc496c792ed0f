"""The log is the checkpoint: complete, signed, chained, and anybody can be taken out of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peer.finetune import decomfl, kseed
from peer.finetune.seed_rules import SeedRules
from peer.finetune.seedlog import SeedLog, SeedRecord, SeedSummary, SignedEntry
from protocols.errors import RemoteProtocolError
from protocols.identity import public_key_of
from protocols.schema import pack, unpack
from tests.finetune.seed_runs import entry, filled, rules, signer

METHODS = ("decomfl", "kseed")
SENDER = signer(9).peer_id


def numbers(log: SeedLog) -> bytes:
    """All that the log's values depend on."""
    if log.rules.method == "kseed":
        return log.sums().tobytes()
    return b"".join(log.factors(n).tobytes() for n in range(log.next))


def refused(log: SeedLog, raw: bytes, what: str) -> None:
    head, count = log.head, log.next
    with pytest.raises(RemoteProtocolError, match=what) as caught:
        log.append(SENDER, raw)
    assert caught.value.peer == SENDER
    assert (log.head, log.next) == (head, count)


@pytest.mark.parametrize("method", METHODS)
def test_a_log_that_is_passed_on_is_the_same_log(method: str) -> None:
    log = filled(rules(method), rounds=6)
    other = SeedLog(rules(method))
    for number in range(log.next):
        assert not other.append(SENDER, log.record(number))
    assert other.head == log.head
    assert numbers(other) == numbers(log)
    other.verify()


def test_what_a_hundred_peers_rounds_weigh() -> None:
    """Per peer and round: 100 bytes and its key."""
    log = SeedLog(rules(perturbations=16))
    entries = {signer(w).peer_id: entry(log, w, {0: 1.0}, 1) for w in range(1, 101)}
    raw = log.make(entries)
    assert all(len(data) == 100 for data in entries.values())
    assert len(raw) <= 100 * (100 + 32 + 5) + 16


def test_every_head_names_its_whole_history() -> None:
    logs = [filled(rules(), 4), filled(rules(seed=8), 4), filled(rules(), 4, peers=2)]
    assert len({log.head for log in logs}) == 3
    log = filled(rules(), 4)
    assert len({log.head_before(n) for n in range(4)} | {log.head}) == 5
    assert log.head == filled(rules(), 4).head  # signatures of Ed25519 are no matter of chance


@pytest.mark.parametrize("method", METHODS)
def test_a_gap_is_refused_with_the_senders_name(method: str) -> None:
    log = filled(rules(method), 4)
    other = SeedLog(rules(method))
    refused(other, log.record(1), "record 0 of the seed log: got number 1, a gap")
    other.append(SENDER, log.record(0))
    refused(other, log.record(0), "got number 0, a gap")
    refused(other, log.record(3), "got number 3, a gap")


def test_a_record_of_another_history_is_refused() -> None:
    """Its entries were measured at another state, though run and round agree."""
    one, other = filled(rules(), 3), filled(rules(), 3, peers=2)
    there = SeedLog(rules())
    there.append(SENDER, other.record(0))
    refused(there, one.record(1), f"{signer(1).peer_id}'s entry of round 1: wrong signature|wrong")


def changed(log: SeedLog, number: int, **changes: Any) -> bytes:
    return pack(replace(unpack(SeedRecord, log.record(number)), **changes))


def test_a_wrong_signature_is_refused_with_the_sender_and_the_entry() -> None:
    log = filled(rules(), 1)
    record = unpack(SeedRecord, log.record(0))
    victim = record.entries[1]
    bad = replace(victim, entry=victim.entry[:-1] + bytes([victim.entry[-1] ^ 1]))
    raw = changed(log, 0, entries=(record.entries[0], bad, *record.entries[2:]))
    author = next(signer(w).peer_id for w in (1, 2, 3) if signer(w).public_key == victim.author)
    refused(SeedLog(rules()), raw, f"record 0 .*{author}'s entry of round 0: wrong signature")
    taken = replace(victim, author=signer(7).public_key)  # somebody else's words
    rows = sorted([record.entries[0], taken, record.entries[2]], key=lambda row: row.author)
    refused(SeedLog(rules()), changed(log, 0, entries=tuple(rows)), "wrong signature")


def test_entries_out_of_order_twice_or_too_many_are_refused() -> None:
    log = filled(rules(), 1)
    rows = unpack(SeedRecord, log.record(0)).entries
    refused(SeedLog(rules()), changed(log, 0, entries=rows[::-1]), "out of order or given twice")
    refused(SeedLog(rules()), changed(log, 0, entries=(rows[0], rows[0])), "given twice")
    refused(SeedLog(rules()), changed(log, 0, entries=(rows[0],) * 257), "256")
    keys = (b"b" * 32, b"a" * 32)
    refused(SeedLog(rules()), changed(log, 0, bans=keys), "out of order")


def test_bytes_that_are_no_record_are_refused() -> None:
    log = filled(rules(), 1)
    raw = log.record(0)
    for bad in (b"", b"\xc1", raw[:-1], raw + b"\x00", b"\x93" + b"\xce\x00\x00\x00\x00" + raw[2:]):
        refused(SeedLog(rules()), bad, "record 0 of the seed log")
    refused(SeedLog(rules()), bytes(10 * 2**20), "bytes, at most")
    wide = b"\x93\xcd\x00\x00" + raw[2:]  # the number 0 in three bytes: another spelling
    refused(SeedLog(rules()), wide, "another spelling")


def test_every_changed_byte_of_a_record_is_noticed() -> None:
    log = filled(rules(), 2)
    raw = log.record(1)
    for at in range(0, len(raw), 3):
        other = SeedLog(rules())
        other.append(SENDER, log.record(0))
        with pytest.raises(RemoteProtocolError):
            other.append(SENDER, raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])


# ── taking a peer out ────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("method", METHODS)
def test_without_a_peer_is_as_if_its_scalars_had_never_been_counted(method: str) -> None:
    run = rules(method)
    log = filled(run, 8)
    bad = signer(2).peer_id
    view = log.without(bad)
    sums = np.zeros(run.pool)
    for number in range(log.next):
        rest = [r for r in log.readings(number) if r.peer != bad]
        assert len(rest) == 2
        assert [r.peer for r in view.readings(number)] == [r.peer for r in rest]
        if method == "kseed":
            sums = kseed.add(run, sums, rest)
        else:
            expected = decomfl.factors_of(run, decomfl.reduce(run, rest))
            assert view.factors(number).tobytes() == expected.tobytes()
    if method == "kseed":
        assert view.sums().tobytes() == sums.tobytes()
    assert numbers(view) != numbers(log)
    assert view.head == log.head
    assert view.banned == {bad}


@pytest.mark.parametrize("method", METHODS)
def test_without_a_peer_equals_a_log_it_never_was_in(method: str) -> None:
    """The scalars are made up here, so they don't depend on the state."""
    bad = signer(3).peer_id
    view = filled(rules(method), 8).without(bad)
    assert numbers(view) == numbers(filled(rules(method), 8, skip=bad))


@pytest.mark.parametrize("method", METHODS)
def test_a_ban_in_a_record_counts_backwards_and_forwards(method: str) -> None:
    run, bad = rules(method), signer(2).peer_id
    log = filled(run, 4)
    before = log.without(bad)
    entries = {signer(w).peer_id: entry(log, w, {w: 1.0 * w}) for w in (1, 2)}
    assert log.append(SENDER, log.make(entries, bans=[bad]))
    assert log.banned == {bad}
    assert all(r.peer != bad for n in range(5) for r in log.readings(n))
    more = {signer(w).peer_id: entry(log, w, {w: 1.0 * w}) for w in (1, 2)}
    assert not log.append(SENDER, log.make(more))  # still signed and passed on, but not counted
    assert [r.peer for r in log.readings(5)] == [signer(1).peer_id]
    assert before.next == 4
    if method == "kseed":
        assert before.sums().tobytes() == log.sums(upto=4).tobytes()
    else:
        assert numbers(before) == b"".join(log.factors(n).tobytes() for n in range(4))


def test_a_round_whose_only_peer_is_taken_out_is_no_step() -> None:
    log = filled(rules(), 3, peers=1)
    view = log.without(signer(1).peer_id)
    assert not any(view.factors(n).any() for n in range(3))


# ── summaries ────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("method", METHODS)
def test_a_late_joiner_goes_on_from_a_summary_with_the_same_bits(method: str) -> None:
    run = rules(method)
    whole = filled(run, 9)
    early = SeedLog(run)
    for number in range(5):
        early.append(SENDER, whole.record(number))
    carried = unpack(SeedSummary, pack(early.summary()))
    late = SeedLog(run, carried)
    assert (late.first, late.next, late.head) == (5, 5, early.head)
    for number in range(5, 9):
        late.append(SENDER, whole.record(number))
    assert late.head == whole.head
    assert numbers(late) == numbers(whole)
    assert late.summary() == whole.summary()
    assert late.summary().content() == whole.summary().content()
    assert late.sums(since=(7, late.sums(upto=7))).tobytes() == late.sums().tobytes()


def test_a_summary_is_small() -> None:
    run = rules(perturbations=16)
    assert len(pack(filled(run, 50).summary())) < 50 * 64 + 200
    run = rules("kseed", pool=4096)
    assert len(pack(filled(run, 50).summary())) < 8 * 4096 + 200


@pytest.mark.parametrize("method", METHODS)
def test_a_summary_leaves_out_who_was_banned_and_nobody_else_can_be(method: str) -> None:
    run, bad = rules(method), signer(2).peer_id
    view = filled(run, 5).without(bad)
    late = SeedLog(run, view.summary())
    assert late.banned == {bad}
    assert numbers(late) == numbers(view)
    assert numbers(late.without(bad)) == numbers(view)
    with pytest.raises(ValueError, match="fetch all of it"):
        late.without(signer(1).peer_id)
    entries = {signer(1).peer_id: entry(late, 1, {0: 1.0})}
    late.append(SENDER, late.make(entries, bans=[signer(3).peer_id]))
    for what in (lambda: numbers(late), late.summary):
        with pytest.raises(ValueError, match="fetch the whole log"):
            what()


def test_another_runs_or_a_broken_summary_is_refused() -> None:
    run = rules()
    good = filled(run, 3).summary()
    nan = np.full(3 * 4, np.nan, "<f4").tobytes()
    for changes, what in [
        ({"genesis": b"x" * 32}, "another run"), ({"numbers": good.numbers[:-4]}, "44 bytes"),
        ({"rounds": 4}, "48 bytes"), ({"numbers": nan}, "not finite"),
        ({"banned": (b"b" * 32, b"a" * 32)}, "out of order"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=what):
            SeedLog(run, replace(good, **changes))  # type: ignore[arg-type]


def test_records_of_strangers_keys_are_no_surprise() -> None:
    """Any 32 bytes are a key's; only a signature makes them a peer's."""
    run = rules()
    log = SeedLog(run)
    raw = pack(SeedRecord(0, (SignedEntry(b"\xff" * 32, bytes(76)),), ()))
    refused(log, raw, "entry of round 0")
    assert public_key_of(signer(1).peer_id) == signer(1).public_key
    assert isinstance(run, SeedRules)
