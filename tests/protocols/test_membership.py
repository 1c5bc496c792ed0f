"""Who is there: life comes from words, silence from the clock, and the table has an end."""

from __future__ import annotations

import dataclasses
import random

import pytest

from protocols import limits
from protocols.membership import FAILURES_MAX, Membership, calls_first, seat_of
from protocols.messages import Heartbeat
from protocols.records import PeerRecord
from protocols.types import GroupName, PeerId
from tests.protocols.samples import GROUP, RUN, peer, record

ME = peer(0)
ELSEWHERE = GroupName("site:b")


def stranger(index: int, group: GroupName = GROUP) -> PeerRecord:
    """A record whose peer id is no key: the table does not look."""
    return PeerRecord(PeerId(f"s{index}"), RUN, group, "", (), 1, True, 0, 0, 1, 2)


@pytest.fixture
def table() -> Membership:
    made = Membership(ME)
    made.saw(record(1), 100.0)
    made.heard(peer(1), 100.0)
    return made


def live(table: Membership, now_s: float) -> list[PeerId]:
    return [n.record.peer for n in table.live(GROUP, now_s)]


def test_a_record_alone_is_no_sign_of_life(table: Membership) -> None:
    assert table.saw(record(2), 100.0)
    assert not table.saw(record(2), 100.1)
    assert live(table, 100.2) == [peer(1)]
    table.heard(peer(2), 100.3)
    assert live(table, 100.4) == [peer(1), peer(2)]


def test_a_later_record_replaces_an_earlier_one_and_never_the_reverse(table: Membership) -> None:
    table.saw(record(1, issued_ms=60_000, upload_kbps=7), 101.0)
    table.saw(record(1, issued_ms=55_000, upload_kbps=8), 102.0)
    known = table.get(peer(1))
    assert known is not None
    assert known.record.upload_kbps == 7


def test_silence_is_suspected_and_one_word_clears_it(table: Membership) -> None:
    in_time_s = 100.0 + limits.SUSPECT_AFTER_S
    assert table.sweep(GROUP, in_time_s) == []
    assert live(table, in_time_s) == [peer(1)]
    assert live(table, in_time_s + 0.01) == []
    assert table.sweep(GROUP, in_time_s + 0.01) == [(peer(1), 100.0)]
    assert table.sweep(GROUP, in_time_s + 1.0) == [], "suspected once is enough"
    table.heard(peer(1), in_time_s + 2.0)
    assert live(table, in_time_s + 2.1) == [peer(1)]


def test_only_the_groups_own_silence_counts(table: Membership) -> None:
    assert table.sweep(ELSEWHERE, 110.0) == []
    known = table.get(peer(1))
    assert known is not None
    assert not known.suspected


def test_two_failures_in_a_row_are_suspicious_one_is_not(table: Membership) -> None:
    told = [table.undelivered(peer(1)) for _ in range(FAILURES_MAX + 2)]
    assert told == [False] * (FAILURES_MAX - 1) + [True] + [False, False]
    assert live(table, 100.1) == []
    table.heard(peer(1), 100.2)
    assert live(table, 100.3) == [peer(1)]
    for _ in range(10):  # but not when something got through in between
        assert not table.undelivered(peer(1))
        table.delivered(peer(1), 0.01)
    assert live(table, 100.3) == [peer(1)]


def test_who_says_goodbye_is_gone_until_it_speaks_again(table: Membership) -> None:
    table.said_goodbye(peer(1))
    assert table.in_group(GROUP) == []
    assert live(table, 100.1) == []
    table.heard(peer(1), 100.2)
    assert live(table, 100.3) == [peer(1)]


def test_the_lost_are_forgotten_in_the_end(table: Membership) -> None:
    last_s = 100.0 + limits.FORGET_AFTER_S + limits.RECORD_TTL_S
    table.sweep(GROUP, last_s)
    assert table.get(peer(1)) is not None
    table.sweep(GROUP, last_s + limits.SUSPECT_AFTER_S + 0.1)
    assert table.get(peer(1)) is None


def test_a_record_that_is_stored_again_keeps_its_peer_known(table: Membership) -> None:
    for step in range(1, 30):
        table.saw(record(1), 100.0 + step * limits.RECORD_REFRESH_S)
        table.sweep(GROUP, 100.0 + step * limits.RECORD_REFRESH_S)
    assert table.get(peer(1)) is not None


def test_a_heartbeat_says_where_a_peer_stands_and_whether_that_is_news(table: Membership) -> None:
    beat = Heartbeat(RUN, GROUP, 4, 9, b"d" * 32, True, 0)
    assert table.heartbeat(peer(1), beat, 101.0)
    known = table.get(peer(1))
    assert known is not None
    assert (known.epoch, known.round, known.digest, known.ready) == (4, 9, b"d" * 32, True)
    assert not table.heartbeat(peer(1), beat, 102.0)
    assert known.heard_s == 102.0, "no news is a sign of life too"
    table.said_goodbye(peer(1))
    assert table.heartbeat(peer(1), beat, 103.0), "it is back"
    assert live(table, 103.1) == [peer(1)]
    assert table.heartbeat(peer(1), dataclasses.replace(beat, group=ELSEWHERE), 104.0)
    assert live(table, 104.1) == []
    assert [n.record.peer for n in table.in_group(ELSEWHERE)] == [peer(1)]


def test_strangers_leave_no_trace(table: Membership) -> None:
    beat = Heartbeat(RUN, GROUP, 1, 1, b"", True, 0)
    table.heard(peer(9), 100.0)
    assert not table.heartbeat(peer(9), beat, 100.0)
    table.delivered(peer(9), 0.1)
    table.said_goodbye(peer(9))
    assert not table.undelivered(peer(9))
    assert table.get(peer(9)) is None
    assert len(table.everybody()) == 1


def test_the_round_trip_time_forgets_busy_moments(table: Membership) -> None:
    for rtt_s in (0.5, 0.010, 0.8, 0.8):
        table.delivered(peer(1), rtt_s)
    known = table.get(peer(1))
    assert known is not None
    assert known.rtt_s == pytest.approx(0.011, abs=0.001)
    for _ in range(200):  # but follows when the distance really changed
        table.delivered(peer(1), 0.3)
    assert known.rtt_s == pytest.approx(0.3)


def test_the_table_has_an_end() -> None:
    table = Membership(ME)
    for index in range(limits.KNOWN_PEERS_MAX + 300):
        assert table.saw(stranger(index), float(index))
        table.heard(PeerId(f"s{index}"), float(index))
        if index % 500 == 0 or index > limits.KNOWN_PEERS_MAX:
            assert len(table.everybody()) == min(index + 1, limits.KNOWN_PEERS_MAX)
    assert table.get(PeerId("s0")) is None, "the one heard longest ago went first"
    assert table.get(PeerId(f"s{limits.KNOWN_PEERS_MAX + 299}")) is not None


def test_a_flood_of_first_words_does_not_push_our_company_out(table: Membership) -> None:
    known = table.get(peer(1))
    assert known is not None
    known.hailed_s = 100.0  # as the machine notes when it sends its heartbeat
    for index in range(limits.KNOWN_PEERS_MAX + 100):
        table.saw(stranger(index), 100.5)
        table.heard(PeerId(f"s{index}"), 100.5)
    assert table.get(peer(1)) is known
    assert len(table.everybody()) == limits.KNOWN_PEERS_MAX


def test_whatever_happens_the_living_are_those_heard_lately() -> None:
    """Random histories against the rule, said in one line."""
    for seed in range(300):
        rng = random.Random(seed)
        table = Membership(ME)
        heard_s: dict[PeerId, float] = {}
        out: set[PeerId] = set()
        now_s = 100.0
        for i in range(1, 6):
            table.saw(record(i), now_s)
        failures: dict[PeerId, int] = {}
        for _ in range(80):
            now_s += rng.uniform(0.0, 1.5)
            who = peer(rng.randint(1, 5))
            match rng.randrange(6):
                case 0 | 1 | 2:
                    table.heard(who, now_s)
                    heard_s[who] = now_s
                    out.discard(who)
                    failures[who] = 0
                case 3:
                    table.undelivered(who)
                    failures[who] = failures.get(who, 0) + 1
                    if failures[who] >= FAILURES_MAX:
                        out.add(who)
                case 4 if rng.random() < 0.3:
                    table.said_goodbye(who)
                    out.add(who)
                case _:
                    table.sweep(GROUP, now_s)
            expected = {
                p
                for p, at_s in heard_s.items()
                if now_s - at_s <= limits.SUSPECT_AFTER_S and p not in out
            }
            assert set(live(table, now_s)) == expected, f"seed {seed} at {now_s:.2f}"


def test_who_cannot_be_reached_carries_next_to_nothing() -> None:
    assert seat_of(record(1, upload_kbps=500)).weight == 500
    assert seat_of(record(1, upload_kbps=500, reachable=False)).weight == 1
    assert seat_of(record(1, upload_kbps=0)).weight == 1


def test_a_run_of_short_rounds_believes_in_no_long_pause() -> None:
    table = Membership(peer(0), pause_s_max=1.0)
    table.saw(record(1), 0.0)
    table.announced(peer(1), 60_000, 0.0)
    assert table.live(GROUP, 3.4)
    assert not table.live(GROUP, 3.6)


def test_the_version_tells_news_from_mere_signs_of_life() -> None:
    table = Membership(peer(0))
    beat = Heartbeat(RUN, GROUP, 1, 4, b"d" * 32, True, 1000)
    table.saw(record(1), 0.0)
    assert table.heartbeat(peer(1), beat, 1.0)
    version, live = table.version, table.live(GROUP, 1.0)
    assert not table.heartbeat(peer(1), beat, 2.0)
    assert table.version == version
    assert table.live(GROUP, 2.0) is live
    assert table.live(GROUP, 60.0) == []
    assert table.version > version, "silence is news"
    table.heartbeat(peer(1), beat, 61.0)
    assert table.live(GROUP, 61.0) == live


def test_an_answer_that_its_own_sender_overtook_changes_nothing(table: Membership) -> None:
    newer = Heartbeat(RUN, GROUP, 1, 5, b"n" * 32, True, 1000)
    older = Heartbeat(RUN, GROUP, 1, 4, b"o" * 32, True, 1000)
    newer = dataclasses.replace(newer, next_ms=30_000)  # and calls seldom from now on
    table.heartbeat(peer(1), newer, 100.2)
    known = table.get(peer(1))
    assert known is not None
    due_s = known.next_s
    table.heartbeat(peer(1), older, 100.3, asked_s=100.1)
    assert (known.round, known.heard_s, known.next_s) == (5, 100.3, due_s)
    table.heartbeat(peer(1), older, 100.5, asked_s=100.4)  # it stepped back since
    assert known.round == 4


def test_of_every_two_exactly_one_calls() -> None:
    names = [peer(i) for i in range(40)]
    first = [calls_first(a, b) for a in names for b in names if a < b]
    assert all(
        calls_first(a, b) == calls_first(b, a) in (a, b) for a in names for b in names if a != b
    )
    share = [first.count(name) / (len(names) - 1) for name in names]
    assert 0.15 < min(share) <= max(share) < 0.85


def test_who_answers_us_owes_no_word_before_we_call() -> None:
    table = Membership(peer(0))
    ours = next(i for i in range(1, 9) if calls_first(peer(0), peer(i)) == peer(0))
    theirs = next(i for i in range(1, 9) if calls_first(peer(0), peer(i)) == peer(i))
    for i in (ours, theirs):
        table.saw(record(i), 100.0)
        table.next_call_s = 200.0
        table.announced(peer(i), 1000, 100.0)
    assert live(table, 150.0) == [peer(ours)]
    assert live(table, 200.0 + limits.SUSPECT_AFTER_S) == []
