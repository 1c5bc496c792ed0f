"""Near peers end up in one group, whoever looks and in whatever order."""

from __future__ import annotations

import random

from protocols.grouping import NEAR_RTT_S, choose_group
from protocols.records import PeerRecord
from protocols.types import GroupName, PeerId
from tests.protocols.samples import peer, record

NONE = GroupName("")


def own_group(index: int) -> GroupName:
    return GroupName(f"near:{peer(index)[-12:]}")


def lone(index: int, **changes: object) -> PeerRecord:
    return record(index, **{"site": "", "group": own_group(index), **changes})


def looking(index: int, **changes: object) -> PeerRecord:
    return lone(index, **{"group": NONE, **changes})


def all_near(records: list[PeerRecord], rtt_s: float = 0.01) -> dict[PeerId, float]:
    return {r.peer: rtt_s for r in records}


def choose(
    me: PeerRecord,
    others: list[PeerRecord],
    *,
    rtt_s: dict[PeerId, float] | None = None,
    members_max: int = 16,
) -> GroupName | None:
    """What `me` chooses when everybody's latest word is in its record."""
    rtts = all_near(others) if rtt_s is None else rtt_s
    return choose_group(me, [(r, r.group) for r in others], rtts, members_max)


def test_a_declared_site_wins_over_everything() -> None:
    others = [lone(i) for i in range(1, 5)]
    for current in (NONE, own_group(0), own_group(1), GroupName("site:old")):
        assert choose(lone(0, site="lab", group=current), others) == "site:lab"


def test_nobody_near_means_a_group_of_ones_own() -> None:
    others = [lone(i) for i in range(1, 5)]
    assert choose(looking(0), []) == own_group(0)
    assert choose(looking(0), others, rtt_s={}) == own_group(0)
    assert choose(looking(0), others, rtt_s=all_near(others, 2 * NEAR_RTT_S)) == own_group(0)
    assert choose(lone(0), others, rtt_s=all_near(others, 0.2)) == own_group(0)


def test_who_has_no_label_joins_no_labelled_site_however_near() -> None:
    labelled = [record(i, site="a") for i in range(1, 5)]
    assert choose(looking(0), labelled) == own_group(0)


def test_of_those_who_look_at_once_the_oldest_founds_and_the_others_wait() -> None:
    for seed in range(500):
        rng = random.Random(seed)
        seekers = [looking(i, founded_ms=rng.randint(0, 3)) for i in range(rng.randint(1, 8))]
        oldest = min(seekers, key=lambda r: (r.founded_ms, r.peer))
        for me in seekers:
            chosen = choose(me, [r for r in seekers if r is not me], rtt_s=all_near(seekers))
            assert (chosen is not None) == (me is oldest), f"seed {seed}"


def test_nobody_waits_for_those_who_are_far_or_have_a_label() -> None:
    for other in (looking(1, founded_ms=1), record(1, group=NONE, founded_ms=1)):
        rtt_s = {peer(1): 0.2 if not other.site else 0.001}
        assert choose(looking(0, founded_ms=9), [other], rtt_s=rtt_s) == own_group(0)


def test_what_a_peer_said_last_counts_not_what_its_record_says() -> None:
    moved = lone(1, founded_ms=1)
    chosen = choose_group(looking(0), [(moved, own_group(7))], all_near([moved]), 16)
    assert chosen == own_group(7)


def test_a_newcomer_joins_the_oldest_near_group() -> None:
    others = [lone(1, founded_ms=50), lone(2, founded_ms=10), lone(3, founded_ms=30)]
    assert choose(looking(0), others) == own_group(2)
    far = all_near(others) | {peer(2): 0.5}
    assert choose(looking(0), others, rtt_s=far) == own_group(3)


def test_a_group_with_history_comes_before_an_older_one_without() -> None:
    others = [lone(1, founded_ms=10), lone(2, founded_ms=99, round=7)]
    assert choose(looking(0), others) == own_group(2)


def test_a_group_is_as_far_as_its_middle_member() -> None:
    group = [record(i, site="", group=own_group(1)) for i in range(1, 4)]
    rtt_s = {peer(1): 0.001, peer(2): 0.002, peer(3): 9.0}
    assert choose(looking(0), group, rtt_s=rtt_s) == own_group(1)
    rtt_s[peer(2)] = 9.0
    assert choose(looking(0), group, rtt_s=rtt_s) == own_group(0)


def test_the_order_of_the_records_does_not_matter() -> None:
    for seed in range(2000):
        rng = random.Random(seed)
        records = [
            lone(
                i,
                group=own_group(rng.randint(1, 5)),
                founded_ms=rng.randint(0, 3),
                round=rng.choice([0, 0, 5]),
            )
            for i in range(1, rng.randint(2, 14))
        ]
        rtts = {r.peer: rng.choice([0.001, 0.02, 0.2]) for r in records if rng.random() < 0.8}
        me = lone(0, group=rng.choice([NONE, own_group(0), own_group(9)]))
        first = choose(me, records, rtt_s=rtts, members_max=4)
        for _ in range(3):
            rng.shuffle(records)
            again = choose(me, records, rtt_s=rtts, members_max=4)
            assert again == first, f"seed {seed}"


def test_nobody_joins_a_group_that_is_full() -> None:
    for members in range(1, 8):
        group = [record(i, site="", group=own_group(1)) for i in range(1, members + 1)]
        chosen = choose(looking(0), group, members_max=4)
        assert chosen == (own_group(1) if members < 4 else own_group(0))


def test_peers_that_come_one_by_one_never_fill_a_group_beyond_its_limit() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        members_max = rng.randint(2, 6)
        standing: list[PeerRecord] = []
        for index in range(30):
            rtts = {r.peer: rng.choice([0.001, 0.02, 0.2]) for r in standing}
            group = choose(looking(index), standing, rtt_s=rtts, members_max=members_max)
            standing.append(lone(index, group=group))
            count = sum(r.group == group for r in standing)
            assert count <= members_max, f"seed {seed}: {count} in {group}"


def test_a_peer_with_company_stays() -> None:
    here = own_group(3)
    company = [lone(1, group=here, founded_ms=900)]
    better = [lone(2, group=own_group(2), founded_ms=1, round=99)]
    assert choose(lone(0, group=here), company + better) == here
    # Even when the company is far away by now.
    assert choose(lone(0, group=here), company + better, rtt_s=all_near(better)) == here


def test_a_lone_founder_gives_its_group_up_for_an_older_one_nearby() -> None:
    older = lone(1, founded_ms=5)
    assert choose(lone(0, founded_ms=6), [older]) == own_group(1)


def test_of_two_lone_founders_exactly_one_moves() -> None:
    for seed in range(2000):
        rng = random.Random(seed)
        a, b = (
            lone(i, founded_ms=rng.randint(0, 2), round=rng.choice([0, 0, 3])) for i in range(2)
        )
        from_a = choose(a, [b])
        from_b = choose(b, [a])
        assert from_a == from_b, f"seed {seed}: they swap places or stay apart"
        assert from_a in (a.group, b.group)


def test_any_number_of_lone_founders_become_one_group() -> None:
    """All look at once, again and again: the worst case for swapping places."""
    for seed in range(300):
        rng = random.Random(seed)
        standing = [
            lone(i, founded_ms=rng.randint(0, 3), round=rng.choice([0, 0, 2]))
            for i in range(rng.randint(2, 8))
        ]
        for _ in range(6):
            groups = [
                choose(me, [r for r in standing if r is not me], rtt_s=all_near(standing))
                for me in standing
            ]
            standing = [
                lone(i, group=g, founded_ms=r.founded_ms, round=r.round)
                for i, (g, r) in enumerate(zip(groups, standing, strict=True))
            ]
        assert len({r.group for r in standing}) == 1, f"seed {seed}: {standing}"
