"""Which run a newcomer joins: nobody starts one of his own where others train."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from pathlib import Path

import pytest

from dht.memory import MemoryBoard, MemoryDirectory
from dht.rules import NOTICE_REFRESH_S
from peer import finding
from peer.errors import RunNotFoundError
from peer.home import open_seat
from peer.manifest import Manifest, default_manifest
from peer.observe import events as ev
from protocols.types import RunId
from tests.protocols.samples import peer

DEFAULT = default_manifest()
STORM, CALM = (dataclasses.replace(DEFAULT, name=name) for name in ("storm", "calm"))
LONG_S, SHORT_S = 60.0, 0.2


class Place:
    """A directory that others write to."""

    def __init__(self) -> None:
        self.board = MemoryBoard()
        self.told: list[ev.Event] = []

    async def announce(self, *manifests: Manifest) -> None:
        for number, manifest in enumerate(manifests):
            directory = MemoryDirectory(self.board, peer(number))
            data = manifest.to_canonical()
            assert await directory.publish_manifest(manifest.run_id(), data, manifest.name)

    async def find(
        self, wanted: str | None = None, remembered: Manifest | None = None,
        empty_s: float = SHORT_S, find_s: float = LONG_S,
    ) -> tuple[RunId, bool]:  # fmt: skip
        manifest, first = await finding.find_manifest(
            MemoryDirectory(self.board, peer(99)), wanted, default_manifest, self.told.append,
            remembered, find_s=find_s, empty_s=empty_s,
        )  # fmt: skip
        return manifest.run_id(), first


async def test_the_only_run_is_joined_at_once() -> None:
    place = Place()
    await place.announce(STORM)
    assert await place.find(empty_s=LONG_S) == (STORM.run_id(), False)


async def test_the_default_run_starts_only_where_none_is_announced_for_a_while() -> None:
    place = Place()
    looking = asyncio.create_task(place.find(empty_s=1.0))
    await asyncio.sleep(0)
    await place.announce(STORM)  # a node had come back with nothing, and is told again
    assert await looking == (STORM.run_id(), False)
    assert await Place().find() == (DEFAULT.run_id(), True)


def test_those_who_train_announce_their_run_more_often_than_newcomers_give_up() -> None:
    assert finding.EMPTY_S > 1.2 * NOTICE_REFRESH_S + 3.0
    assert finding.FIND_RUN_S > finding.EMPTY_S


async def test_who_was_in_a_run_goes_back_to_it_whatever_else_is_there() -> None:
    place = Place()
    await place.announce(STORM, CALM)
    assert await place.find(remembered=CALM, empty_s=LONG_S) == (CALM.run_id(), False)
    with pytest.raises(RunNotFoundError, match="several runs are here"):
        await place.find()


async def test_ours_is_waited_for_before_another_is_joined() -> None:
    place = Place()
    await place.announce(CALM)
    looking = asyncio.create_task(place.find(remembered=STORM, empty_s=LONG_S))
    await asyncio.sleep(0.1)
    assert not looking.done()
    await place.announce(CALM, STORM)
    assert await looking == (STORM.run_id(), False)
    place = Place()
    await place.announce(CALM)  # in another network
    assert await place.find(remembered=STORM) == (CALM.run_id(), False)


async def test_where_nobody_trains_the_last_run_goes_on() -> None:
    assert await Place().find(remembered=STORM) == (STORM.run_id(), False)


async def test_who_names_a_run_gets_that_one_or_hears_what_is_there() -> None:
    place = Place()
    await place.announce(STORM, CALM)
    begin = CALM.run_id()[:12]
    assert await place.find(wanted=begin, remembered=STORM) == (CALM.run_id(), False)
    with pytest.raises(RunNotFoundError, match=r"storm, 1 peers"):
        await place.find(wanted=DEFAULT.run_id(), find_s=SHORT_S)


def test_what_another_version_wrote_is_no_reason_to_stay_away(tmp_path: Path) -> None:
    with contextlib.closing(open_seat(tmp_path)) as seat:
        folder = seat.run_folder(STORM.run_id())
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "manifest.json"
        for data in (b"", b"not a manifest", CALM.to_canonical()):
            file.write_bytes(data)
            assert finding.readable_manifest(seat, STORM.run_id()) is None
        file.write_bytes(STORM.to_canonical())
        assert finding.readable_manifest(seat, STORM.run_id()) == STORM
