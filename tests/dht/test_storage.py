"""What one node keeps for others is bounded, and what others send it is taken with care."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration

from dht.rules import Rules, members_key
from dht.validator import NEIGHBOURS_MAX, SUBKEYS_MAX, BoundedStorage, Validator, guard
from protocols.records import sign_record
from tests.dht.samples import RUN, record, signer

ALICE = signer("alice")
PLACE = DHTID.generate(members_key(RUN, "peers/"))


class Protocol(SimpleNamespace):
    """As much of hivemind's DHTProtocol as `guard` touches; `reply` is what a node answers."""

    serializer = MSGPackSerializer
    reply: Any

    async def call_find(self, peer: object, keys: object) -> Any:
        return self.reply


def guarded() -> Protocol:
    protocol = Protocol(record_validator=Validator(Rules()), reply=None)
    guard(protocol)
    return protocol


def shard(*, forged: int) -> DictionaryDHTValue:
    """Alice's true record among `forged` bad ones."""
    truth = record(ALICE)
    entries = DictionaryDHTValue()
    end_s = truth.expires_ms / 1000
    packed = MSGPackSerializer.dumps(sign_record(ALICE, truth))
    entries.store(ALICE.peer_id, packed, end_s)
    for number in range(forged):
        entries.store(f"forged {number}", packed, end_s)
    return entries


def test_bad_entries_are_dropped_and_do_not_take_the_good_ones_with_them() -> None:
    entries = shard(forged=3)
    assert guarded()._validate_dictionary(PLACE.to_bytes(), entries)
    assert list(entries.data) == [ALICE.peer_id]


async def test_a_node_cannot_end_a_search_by_claiming_that_its_answer_lives_for_ever() -> None:
    protocol = guarded()
    neighbours = {number: number for number in range(1000)}
    entries = shard(forged=0)
    end_s = entries.latest_expiration_time
    protocol.reply = {PLACE: (ValueWithExpiration(entries, float("inf")), neighbours)}
    found, near = (await protocol.call_find("somebody", [PLACE]))[PLACE]
    assert found.expiration_time == end_s
    assert list(found.value.data) == [ALICE.peer_id]
    assert len(near) == NEIGHBOURS_MAX
    nothing = ValueWithExpiration(DictionaryDHTValue(), float("inf"))
    protocol.reply = {PLACE: (nothing, {})}
    assert await protocol.call_find("somebody", [PLACE]) == {PLACE: (None, {})}
    protocol.reply = None
    assert await protocol.call_find("somebody", [PLACE]) is None


def test_a_shard_and_a_node_are_bounded() -> None:
    storage = BoundedStorage(8)
    now_s = time.time()
    for number in range(SUBKEYS_MAX + 10):
        storage.store_subkey(PLACE, f"peer {number}", b"x", now_s + 10 + number)
    assert len(storage.get(PLACE).value) == SUBKEYS_MAX
    for number in range(20):
        storage.store(DHTID.generate(b"%d" % number), b"x", now_s + 2 * SUBKEYS_MAX)
    assert len(storage) == 8


def test_an_old_record_sent_again_cannot_shorten_the_life_of_the_new_one() -> None:
    storage = BoundedStorage(8)
    now_s = time.time()
    assert storage.store_subkey(PLACE, "peer", b"new", now_s + 100)
    assert not storage.store_subkey(PLACE, "peer", b"old", now_s + 50)
    assert storage.store_subkey(PLACE, "peer", b"new", now_s + 100)  # it is there: that is a yes
    entries = storage.get(PLACE).value
    assert entries.get("peer").value == b"new"
    assert entries.key_to_heap["peer"].expiration_time == now_s + 100
