"""Every block is trained once, re-issued or logged lost, whatever happens to peers."""

from __future__ import annotations

import random

import pytest

from protocols import limits
from protocols.blocks import BlockRange, BlockReport
from protocols.errors import RemoteProtocolError
from protocols.ledger import Entry, Ledger, cover_of, entries_of
from protocols.ledger_state import pack_ledger, unpack_ledger
from protocols.messages import (
    ContributionHeader,
    Contributor,
    OutcomeHeader,
    decode_header,
    encode,
)
from protocols.ranges import Ranges
from protocols.schema import SchemaError
from protocols.sharding import Shares, block_of
from protocols.types import GroupName, PeerId
from tests.protocols.ledger_world import RUN, LedgerWorld

ALL = 0b1111
SEEDS = 50


def ledger(blocks: int = 1000) -> Ledger:
    return Ledger(RUN, blocks, 4)


def entry(peer: str, cover: int = ALL, **lists: list[tuple[int, int]]) -> Entry:
    told = {name: tuple(BlockRange(a, b) for a, b in ranges) for name, ranges in lists.items()}
    return Entry(PeerId(peer), BlockReport(**told), cover)  # type: ignore[arg-type]


def test_where_nothing_goes_wrong_every_block_is_trained_exactly_once() -> None:
    for seed in range(16):
        rng = random.Random(seed)
        world = LedgerWorld(seed, blocks=rng.choice([7, 100, 1000, 50_000]))
        for i in range(rng.randint(1, 8)):
            world.add(f"p{i}")
        for _ in range(40):
            world.step()
        world.check()
        totals = world.members[PeerId("p0")].work.ledger.totals()
        assert (totals.repeated, totals.reissued, totals.lost) == (0, 0, 0), f"seed {seed}"
        assert totals.trained > 40 * 0.4


def test_whatever_happens_every_block_is_trained_or_accounted_for() -> None:
    for seed in range(SEEDS):
        rng = random.Random(seed)
        units = rng.choice([1, 4, 9])
        world = LedgerWorld(
            seed, blocks=rng.choice([5, 64, 300, 5000]), units=units,
            loss=rng.choice([0, 0.1, 0.3]), part=rng.choice([0, 0.3, 0.8]),
            fragments=rng.choice([1, 1, min(2, units), min(4, units)]),
        )  # fmt: skip
        names = [f"p{i}" for i in range(rng.randint(2, 9))]
        for name in names[: rng.randint(1, len(names))]:
            world.add(name)
        for _ in range(rng.randint(10, 60)):
            world.step()
            alive = [n for n in names if PeerId(n) in world.members]
            gone = [n for n in names if PeerId(n) not in world.members]
            if len(alive) > 1 and rng.random() < 0.15:
                getattr(world, rng.choice(["crash", "leave"]))(rng.choice(alive[1:]))
            if gone and rng.random() < 0.3:
                world.add(rng.choice(gone))
        world.check()


def test_nothing_is_lost_when_peers_leave_politely() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        world = LedgerWorld(seed, blocks=500, loss=0.2, part=0.3)
        names = [f"p{i}" for i in range(6)]
        for name in names:
            world.add(name)
        for _ in range(5):
            world.step()
        trained = {n for m in world.members.values() for n in range(9000) if n in m.work.in_flight}
        for name in names[1:4]:
            world.leave(name)
        for _ in range(rng.randint(20, 30)):
            world.step()
        assert len(world.members) == 3, f"seed {seed}"
        assert trained <= set(world.done), f"seed {seed}: work was lost on a clean leave"
        world.check()
        assert not world.lost, f"seed {seed}"


def test_who_vanishes_is_not_waited_for_and_others_take_its_blocks() -> None:
    world = LedgerWorld(3, blocks=100)
    for name in ("a", "b", "c"):
        world.add(name)
    for _ in range(4):
        world.step()
    held = world.members[PeerId("b")].work.ledger.leases_of(PeerId("b"))
    assert held
    world.crash("b")
    for _ in range(80):
        world.step()
    world.check()
    assert all(n in world.done for start, stop in held for n in range(start, stop))
    assert {n for start, stop in held for n in range(start, stop)} <= world.reissued


def test_a_goodbye_that_most_heard_frees_at_once_and_one_liar_frees_nothing() -> None:
    book = ledger()
    book.apply(0, [entry("a", held=[(0, 5)]), entry("b", held=[(5, 9)]), entry("c"), entry("d")])
    liar = Entry(PeerId("c"), BlockReport(left=(PeerId("a"),)), ALL)
    assert book.apply(1, [entry("b", held=[(5, 9)]), entry("d"), liar]).reissued == ()
    votes = [Entry(PeerId(p), BlockReport(left=(PeerId("a"),)), ALL) for p in "cd"]
    counted = book.apply(2, [entry("b", held=[(5, 9)]), *votes])
    assert [(r.peer, r.blocks) for r in counted.reissued] == [("a", ((0, 5),))]
    assert not book.leases_of(PeerId("a"))


def test_a_block_counts_once_its_work_is_inside_every_unit() -> None:
    book = ledger()
    assert not book.apply(0, [entry("a", cover=0b0011, trained=[(0, 3)])]).trained
    assert not book.apply(1, [entry("a", cover=0b0100, trained=[(0, 5)])]).trained
    counted = book.apply(2, [entry("a", cover=0b1000, trained=[(0, 6)])])
    assert counted.trained == {"a": ((0, 3),)}
    assert book.totals().in_flight == 3
    counted = book.apply(3, [entry("a", cover=0b0111, trained=[(3, 6)])])
    assert counted.trained == {"a": ((3, 6),)}, "the round before had unit 3"


def test_work_that_its_owner_no_longer_speaks_of_is_issued_again() -> None:
    book = ledger()
    book.apply(0, [entry("a", cover=0b0011, trained=[(0, 3)])])
    counted = book.apply(1, [entry("a", trained=[(7, 8)])])
    assert [(r.blocks, r.reason) for r in counted.reissued] == [(((0, 3),), "given up")]


def test_only_one_holds_a_block_and_work_done_comes_before_claims() -> None:
    book = ledger()
    book.apply(0, [entry("a", held=[(0, 40)]), entry("b", begun=[(3, 4)], held=[(10, 50)])])
    assert book.fault() == ""
    assert 3 in book.leases_of(PeerId("b"))
    assert len(book.leases_of(PeerId("a")) & book.leases_of(PeerId("b"))) == 0
    assert book.leases_of(PeerId("a")) | book.leases_of(PeerId("b")) == Ranges([(0, 50)])
    book.apply(1, [entry("a", held=[(0, 50)]), entry("b", begun=[(3, 4)], held=[(10, 50)])])
    assert book.leases_of(PeerId("a")) | book.leases_of(PeerId("b")) == Ranges([(0, 50)])


def test_one_liar_far_ahead_moves_nobody_and_holds_no_more_than_it_may() -> None:
    book = ledger(100)
    far = book.window
    honest = [entry("a", trained=[(0, 5)]), entry("b", trained=[(5, 9)])]
    liar = entry("z", trained=[(far, far + 100)], held=[(10, 20_000), (2**40, 2**40 + 9)])
    counted = book.apply(0, [*honest, liar])
    assert (counted.lost, book.floor) == ((), 9)
    assert len(book.leases_of(PeerId("z"))) <= limits.LEASE_BLOCKS_MAX
    assert book.taken().top <= book.floor + 2 * book.window


def test_a_hoarder_costs_blocks_and_that_is_logged() -> None:
    book = ledger(100)
    lost = 0
    for number in range(200):
        start = 200 * number
        hoard = entry("z", held=[(10, 20)])
        work = (
            [
                entry(p, trained=[(start + i * 100, start + i * 100 + 100)])
                for i, p in enumerate("ab")
            ]
            if number
            else [entry("a", trained=[(0, 10), (20, 200)])]
        )
        lost += sum(b - a for a, b in book.apply(number, [*work, hoard]).lost)
        assert book.fault() == ""
    assert (lost, book.totals().lost) == (10, 10)


def test_a_newcomer_keeps_off_what_its_donor_is_at() -> None:
    for seed in range(20):
        world = LedgerWorld(seed, blocks=300)
        first = world.add("a")
        world.train(first, 200)
        assert len(first.work.in_flight) > 100
        world.add("b").speed = 150
        for _ in range(6):
            world.step()
        world.check()
        totals = first.work.ledger.totals()
        assert (totals.repeated, totals.reissued, totals.lost) == (0, 0, 0), f"seed {seed}"


def test_what_another_group_accounts_for_is_trained_by_nobody_here() -> None:
    book = ledger()
    book.apply(0, [entry("a", trained=[(0, 4)], held=[(4, 10)])])
    assert book.merge([(2, 8), (20, 30)]) == 14
    assert book.fault() == ""
    assert book.leases_of(PeerId("a")) == Ranges([(8, 10)])
    assert book.totals().elsewhere == 14
    chosen = book.choose(Shares(RUN, PeerId("a")), 30, Ranges())
    assert not chosen & Ranges([(0, 10), (20, 30)])


def test_groups_and_members_share_the_row_out() -> None:
    peers = [PeerId(f"peer {i}") for i in range(6)]
    groups = {GroupName("g"): peers[:4], GroupName("h"): peers[4:]}
    owners: list[list[PeerId]] = [[] for _ in range(600)]
    for group, members in groups.items():
        elsewhere = {name: len(m) for name, m in groups.items() if name != group}
        for me in members:
            shares = Shares(RUN, me, members, group, elsewhere)
            for extent in range(600):
                if shares.owner(extent) == me:
                    owners[extent].append(me)
    assert all(len(found) == 1 for found in owners), "each extent is exactly one peer's"
    of_g = sum(found[0] in groups[GroupName("g")] for found in owners)
    assert 0.55 < of_g / 600 < 0.78, "groups are weighted by their members"


def test_every_epoch_has_every_block_once_in_an_order_of_its_own() -> None:
    for blocks in (1, 2, 3, 12, 97, 1000, 2**12):
        orders = [
            [block_of(RUN, blocks, epoch * blocks + i) for i in range(blocks)] for epoch in (0, 1)
        ]
        for epoch, order in enumerate(orders):
            assert sorted(order) == [(epoch, b) for b in range(blocks)]
        if blocks > 12:
            assert [b for _, b in orders[0]] != [b for _, b in orders[1]]
            near = sum(abs(a[1] - b[1]) < 3 for a, b in zip(orders[0], orders[0][1:], strict=False))
            assert near < blocks / 10


def test_a_ledger_survives_its_bytes_and_lies_about_it_are_refused() -> None:
    world = LedgerWorld(5, blocks=300, part=0.5, loss=0.2)
    for name in "abcd":
        world.add(name)
    for _ in range(12):
        world.step()
    book = world.members[PeerId("a")].work.ledger
    data = pack_ledger(book)
    again = unpack_ledger(data, RUN, 300, 4)
    assert (pack_ledger(again), again.totals()) == (data, book.totals())
    for run, blocks, units in ((RUN, 301, 4), (RUN, 300, 5), ("cd" * 32, 300, 4)):
        with pytest.raises(SchemaError, match="another"):
            unpack_ledger(data, run, blocks, units)  # type: ignore[arg-type]
    book.counts["trained"] += 1
    with pytest.raises(SchemaError, match="add up"):
        unpack_ledger(pack_ledger(book), RUN, 300, 4)
    for cut in range(0, len(data), 7):
        with pytest.raises(SchemaError):
            unpack_ledger(data[:cut], RUN, 300, 4)


def test_fragments_beyond_the_limit_are_closed_and_counted() -> None:
    book = ledger(2**18)
    for number in range(560):
        ranges = [(number * 200 + 3 * i, number * 200 + 3 * i + 1) for i in range(1, 65)]
        book.apply(number, [entry("a", trained=ranges)])
    assert book.pieces <= limits.LEDGER_RANGES_MAX
    assert book.fault() == ""
    assert len(pack_ledger(book)) < limits.LEDGER_BYTES_MAX


def test_masks_become_bits_of_the_whole_layout() -> None:
    assert cover_of(2, 5, b"") == 0b11100
    assert cover_of(2, 5, b"\x05") == 0b10100
    assert cover_of(2, 5, b"\xff") == 0b11100


def header(start: int, stop: int, contributor: Contributor) -> OutcomeHeader:
    return OutcomeHeader(
        RUN, GroupName("g"), 7, 3, start, start, stop, (contributor,), bytes(32), 1, 0.1, b""
    )


def test_a_contributors_spans_add_up() -> None:
    told = entry("a", trained=[(0, 4)]).report
    halves = [header(0, 2, Contributor(PeerId("a"), 2.0, b"", told)),
              header(2, 4, Contributor(PeerId("a"), 2.0, b"\x02", told))]  # fmt: skip
    assert entries_of(halves) == [Entry(PeerId("a"), told, 0b1011)]


def test_two_contributions_of_who_began_anew_do_not_add_up_to_one() -> None:
    """Each holds the work on its own blocks, and only in its own units."""
    before, after = (entry("a", trained=[r]).report for r in ((0, 4), (2, 3)))
    first = header(0, 2, Contributor(PeerId("a"), 5.0, b"", before))
    second = header(2, 4, Contributor(PeerId("a"), 4.0, b"\x01", after))
    for order in ([first, second], [second, first]):
        assert entries_of(order) == [Entry(PeerId("a"), before, 0b0011)]
        book = ledger()
        assert book.apply(7, entries_of(order)).trained == {}
        # Now it speaks of what it did since, and the block that both did is in all units.
        assert book.apply(8, [Entry(PeerId("a"), after, 0b1100)]).trained == {"a": ((2, 3),)}
        assert book.fault() == ""


def test_of_two_contributions_in_equally_many_units_the_lower_counts() -> None:
    one, other = (entry("a", trained=[r]).report for r in ((0, 4), (2, 3)))
    first = header(0, 2, Contributor(PeerId("a"), 5.0, b"", one))
    second = header(2, 4, Contributor(PeerId("a"), 4.0, b"", other))
    for order in ([first, second], [second, first]):
        assert entries_of(order) == [Entry(PeerId("a"), one, 0b0011)]


def test_a_report_beyond_its_bounds_is_the_senders_fault() -> None:
    def header(report: BlockReport) -> ContributionHeader:
        return ContributionHeader(RUN, GroupName("g"), 1, 1, 0, 0, 4, 1.0, report)

    many = tuple(BlockRange(2 * i, 2 * i + 1) for i in range(limits.REPORT_RANGES_MAX + 1))
    fine = encode(header(BlockReport(trained=many[:-1], held=many[:-1])))
    assert isinstance(decode_header(fine, PeerId("x")), ContributionHeader)
    with pytest.raises(RemoteProtocolError, match="65") as caught:
        decode_header(encode(header(BlockReport(trained=many))), PeerId("x"))
    assert caught.value.peer == "x"
    for bad in (
        {"trained": (BlockRange(5, 6), BlockRange(1, 2))},
        {"held": (BlockRange(1, 5), BlockRange(4, 6))},
        {"held": (BlockRange(0, limits.REPORT_BLOCKS_MAX),), "begun": (BlockRange(1, 2),)},
    ):
        with pytest.raises(ValueError, match=r"order|report of"):
            BlockReport(**bad)
    with pytest.raises(ValueError, match="empty"):
        BlockRange(4, 4)
