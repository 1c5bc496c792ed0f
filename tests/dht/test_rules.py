"""Only three kinds of entry are valid, each only in its own place and only in its own time."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from dht.rules import (
    RUNS_KEY,
    Rules,
    RunEntry,
    count_runs,
    key_id,
    manifest_key,
    members_key,
    sign_run_entry,
)
from protocols import limits
from protocols.cells import cells_of, group_path, neighbourhood
from protocols.coordinates import Coordinate
from protocols.records import DOMAIN, sign, sign_record
from protocols.schema import pack
from protocols.types import RunId
from tests.dht.samples import MANIFEST, OTHER_RUN, RUN, record, signed, signer

ALICE = signer("alice")
BOB = signer("bob")
NOW_S = 1_800_000_000.0
PLACE = key_id(members_key(RUN, "peers/"))


def test_a_record_stands_in_its_own_place_until_its_own_end() -> None:
    rules = Rules()
    data = signed(ALICE, issued_s=NOW_S)
    end_s = NOW_S + 90
    for _ in range(2):  # the second time from memory
        assert rules.allow(PLACE, ALICE.peer_id, data, end_s, NOW_S)
        assert not rules.allow(PLACE, BOB.peer_id, data, end_s, NOW_S)
        assert not rules.allow(PLACE, None, data, end_s, NOW_S)
        assert not rules.allow(PLACE, ALICE.peer_id, data, end_s + 1, NOW_S)
        assert not rules.allow(PLACE, ALICE.peer_id, data, end_s, end_s + 1)
        assert not rules.allow(key_id(b"elsewhere"), ALICE.peer_id, data, end_s, NOW_S)
        other = key_id(members_key(OTHER_RUN, "peers/"))
        assert not rules.allow(other, ALICE.peer_id, data, end_s, NOW_S)


def test_a_record_stands_only_in_the_cells_that_follow_from_what_it_says() -> None:
    rules = Rules()
    lab = sign_record(ALICE, replace(record(ALICE, issued_s=NOW_S, group="site:lab"), site="lab"))
    placed = sign_record(
        ALICE, replace(record(ALICE, issued_s=NOW_S), coordinate=Coordinate(0.1, -0.2, 0.3))
    )
    for data in (lab, placed):
        mine = rules.record(data)
        cells = cells_of(mine)
        paths = [*neighbourhood(mine), *([group_path(mine.group)] if mine.group else [])]
        assert len(cells) == 1 + sum(
            len(path.digits) + (not path.tree.startswith("near")) for path in paths
        )
        for cell in cells:
            place = key_id(members_key(RUN, cell))
            assert rules.allow(place, ALICE.peer_id, data, NOW_S + 90, NOW_S)
        for other in (lab, placed):
            for cell in cells_of(rules.record(other)) - cells:
                place = key_id(members_key(RUN, cell))
                assert not rules.allow(place, ALICE.peer_id, data, NOW_S + 90, NOW_S)


def test_a_record_is_believed_across_a_small_difference_of_clocks_only() -> None:
    rules = Rules()
    for ahead_s, believed in ((limits.CLOCK_SKEW_S_MAX - 1, True), (600.0, False)):
        data = signed(ALICE, issued_s=NOW_S + ahead_s)
        end_s = NOW_S + ahead_s + 90
        assert rules.allow(PLACE, ALICE.peer_id, data, end_s, NOW_S) is believed


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        signed(ALICE, issued_s=NOW_S)[:-1],
        sign_record(BOB, record(BOB, peer=ALICE.peer_id, issued_s=NOW_S)),
        pack(sign(ALICE, "another domain", record(ALICE, issued_s=NOW_S))),
        bytes(limits.RECORD_BYTES_MAX + 1),
    ],
)
def test_a_forged_record_is_refused(data: bytes) -> None:
    assert not Rules().allow(PLACE, ALICE.peer_id, data, NOW_S + 90, NOW_S)


def test_a_manifest_stands_under_its_hash() -> None:
    rules = Rules()
    place = key_id(manifest_key(RUN))
    assert rules.allow(place, None, MANIFEST, NOW_S + 60, NOW_S)
    assert not rules.allow(place, None, MANIFEST + b"!", NOW_S + 60, NOW_S)
    assert not rules.allow(place, ALICE.peer_id, MANIFEST, NOW_S + 60, NOW_S)
    assert not rules.allow(place, None, MANIFEST, NOW_S + 10_000, NOW_S)
    assert not rules.allow(place, None, MANIFEST, float("nan"), NOW_S)


def test_a_run_is_announced_in_ones_own_name() -> None:
    rules = Rules()
    place = key_id(RUNS_KEY)
    end_ms = round((NOW_S + 60) * 1000)
    data = sign_run_entry(ALICE, RunEntry(RUN, "tiny", end_ms))
    assert rules.allow(place, ALICE.peer_id, data, end_ms / 1000, NOW_S)
    assert not rules.allow(place, BOB.peer_id, data, end_ms / 1000, NOW_S)
    assert not rules.allow(place, ALICE.peer_id, data, end_ms / 1000 + 1, NOW_S)
    as_record = pack(sign(ALICE, DOMAIN, RunEntry(RUN, "tiny", end_ms)))
    assert not rules.allow(place, ALICE.peer_id, as_record, end_ms / 1000, NOW_S)


def test_runs_are_counted_by_announcers_and_called_by_their_usual_name() -> None:
    other = RunId("1" * 64)
    found = count_runs([(RUN, "tiny"), (RUN, "tiny"), (RUN, "my own name"), (other, "big")])
    assert [(n.run, n.name, n.peers) for n in found] == [(RUN, "tiny", 3), (other, "big", 1)]


def test_a_signature_is_verified_once() -> None:
    rules = Rules()
    data = signed(ALICE)
    assert rules.record(data) is rules.record(data)
    rounds = 2000
    start_s = time.perf_counter()
    for _ in range(rounds):
        rules.record(data)
    assert (time.perf_counter() - start_s) / rounds < 50e-6
