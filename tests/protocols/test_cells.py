"""Every cell stays small, every search ends, and neighbours find each other across borders."""

from __future__ import annotations

import hashlib
import random
from statistics import mean

from protocols import limits
from protocols.cells import (
    PLACE_DIGITS,
    Path,
    Search,
    cells_of,
    group_path,
    hash_digits,
    levels_to_show,
    neighbourhood,
    place_digits,
    population,
    rank,
    shows,
)
from protocols.coordinates import Coordinate
from protocols.records import PeerRecord
from protocols.types import GroupName, PeerId, RunId

RUN = RunId("ab" * 32)
FULL = limits.CELL_RECORDS_MAX


def record(index: int, coordinate: Coordinate | None, site: str = "") -> PeerRecord:
    name = hashlib.sha256(b"%d" % index).hexdigest()[:44]
    return PeerRecord(
        PeerId(f"12D3KooW{name}"), RUN, GroupName(""), site, (), 1, True, 0, 0, 1, 2, 1, coordinate
    )


def scattered(rng: random.Random, count: int) -> list[PeerRecord]:
    """Peers in clusters of about ten, 3 ms wide, over 200 ms."""
    centres = [[rng.uniform(-0.1, 0.1) for _ in range(3)] for _ in range(max(1, count // 10))]
    found = []
    for index in range(count):
        x_s, y_s, z_s = (c + rng.gauss(0, 0.002) for c in rng.choice(centres))
        found.append(record(index, Coordinate(x_s, y_s, z_s)))
    return found


class Table:
    """What stands at the keys of one path's tree, if everybody follows the rules."""

    def __init__(self, records: list[PeerRecord], tree: str) -> None:
        self.members: dict[str, list[PeerRecord]] = {}
        for one in records:
            for path in neighbourhood(one):
                if path.tree == tree:
                    for level in range(len(path.digits) + 1):
                        self.members.setdefault(path.cell(level), []).append(one)

    def read(self, cell: str) -> list[PeerRecord]:
        inside = self.members.get(cell, [])
        return [one for one in inside if shows(one.peer, len(inside))]

    def search(self, search: Search) -> int:
        reads = 0
        while levels := search.wanted:
            for level in levels:
                reads += 1
                search.found(level, self.read(search.path.cell(level)))
            search.advance()
        return reads


def path_of(one: PeerRecord, tree: str) -> Path:
    return next(path for path in neighbourhood(one) if path.tree == tree)


def test_the_leaf_is_the_first_level_that_is_not_crowded() -> None:
    for seed in range(6):
        rng = random.Random(seed)
        records = scattered(rng, rng.choice([5, 60, 400, 3000]))
        table = Table(records, "near0")
        for one in rng.sample(records, 5):
            path = path_of(one, "near0")
            search = Search(path)
            table.search(search)
            assert search.leaf is not None
            true = [len(table.members[path.cell(n)]) for n in range(len(path.digits) + 1)]
            # Where the count is near the limit, the sample may say one or the other.
            assert true[search.leaf] <= 1.5 * FULL, f"seed {seed}: {true}"
            if search.leaf:
                assert true[search.leaf - 1] >= FULL / 1.5, f"seed {seed}: {true}"


def test_a_search_takes_few_reads_however_many_peers_there_are() -> None:
    rng = random.Random(3)
    for count, reads_max in ((40, 1), (400, 5), (4000, 6)):
        records = scattered(rng, count)
        table = Table(records, "near1")
        fresh: list[int] = []
        again: list[int] = []
        for one in rng.sample(records, 20):
            search = Search(path_of(one, "near1"))
            fresh.append(table.search(search))
            assert search.leaf is not None
            later = Search(search.path, dict(search.counts))
            later.start_at(search.leaf, len(again))
            again.append(table.search(later))
        assert mean(fresh) <= reads_max, count
        assert mean(again) <= 3.3, count


def test_a_search_ends_whatever_it_is_told() -> None:
    """Liars and stale keys may say anything: every level is read once at most."""
    for seed in range(500):
        rng = random.Random(seed)
        crowd = [record(i, Coordinate(rng.uniform(-1, 1))) for i in range(60)]
        search = Search(path_of(crowd[0], "near0"))
        search.start_at(rng.randrange(-2, 30))
        asked: list[int] = []
        while levels := search.wanted:
            asked += levels
            for level in levels:
                search.found(level, rng.choice([[], crowd, crowd[:1], crowd[:30]]))
            search.advance()
        assert len(asked) == len(set(asked)) <= limits.CELL_LEVELS_MAX + 1, f"seed {seed}"
        assert search.leaf is not None


def test_a_crowd_of_any_size_shows_about_the_same_sample() -> None:
    everybody = [record(i, None).peer for i in range(20_000)]
    for count in (10, FULL, 100, 1000, 20_000):
        shown = [rank(p) for p in everybody[:count] if shows(p, count)]
        wanted = count if count <= FULL else limits.CELL_SAMPLE
        assert 0.6 * wanted <= len(shown) <= 1.4 * wanted, count
        assert 0.6 * count <= population(shown) <= 1.5 * count, count
    assert (population([]), population([0.001])) == (0.0, 1.0)


def test_a_peer_stands_at_few_keys_in_a_run_of_any_size() -> None:
    for count in (30, 300, 3000):
        rng = random.Random(count)
        records = scattered(rng, count)
        table = Table(records, "near0")
        keys = []
        for one in rng.sample(records, 25):
            search = Search(path_of(one, "near0"))
            table.search(search)
            levels = levels_to_show(one.peer, search)
            assert len(levels) == len(set(levels))
            assert search.leaf in levels
            keys.append(len(levels))
        assert mean(keys) < 4, count


def test_who_is_cut_apart_in_one_grid_meets_in_the_other() -> None:
    """Two peers 4 ms apart share a cube of 50 ms in at least one of the grids."""
    apart = 0
    for seed in range(3000):
        rng = random.Random(seed)
        x_s, y_s, z_s = (rng.uniform(-0.3, 0.3) for _ in range(3))
        one = Coordinate(x_s, y_s, z_s)
        other = Coordinate(*(v + rng.uniform(-0.0023, 0.0023) for v in (x_s, y_s, z_s)))
        shared = [place_digits(one, g)[:6] == place_digits(other, g)[:6] for g in range(2)]
        apart += not any(shared)
    assert apart / 3000 < 0.03, "only where different axes are cut in each"


def test_digits_are_the_nested_cubes_of_a_point() -> None:
    for seed in range(500):
        rng = random.Random(seed)
        at = Coordinate(*(rng.uniform(-1, 1) for _ in range(3)))
        for grid in range(limits.CELL_GRIDS):
            digits = place_digits(at, grid)
            assert len(digits) == PLACE_DIGITS
            assert set(digits) <= set("01234567")
    bound_s = limits.COORDINATE_S_MAX
    corners = [Coordinate(x, y, z) for x in (-bound_s, bound_s) for y in (-bound_s, bound_s)
               for z in (-bound_s, bound_s)]  # fmt: skip
    assert len({place_digits(c, 0)[:2] for c in corners}) == 8
    assert len(hash_digits("anything")) == limits.CELL_LEVELS_MAX


def test_a_label_comes_before_a_place_and_both_before_nothing() -> None:
    at = Coordinate(0.01)
    assert [p.tree for p in neighbourhood(record(1, at))] == ["near0", "near1"]
    (labelled,) = neighbourhood(record(1, at, "lab"))
    assert labelled.tree.startswith("site/")
    assert neighbourhood(record(1, None)) == []
    assert cells_of(record(1, None)) == {"peers/"}
    assert path_of(record(1, at), "near0").cell(0) == path_of(record(1, at), "near1").cell(0)
    assert group_path(GroupName("near:a")) == group_path(GroupName("near:a"))
