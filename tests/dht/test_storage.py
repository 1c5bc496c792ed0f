"""What one node keeps for others is bounded."""

from __future__ import annotations

import time

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue

from dht.validator import SUBKEYS_MAX, BoundedStorage


def test_a_shard_is_bounded_and_an_old_record_cannot_shorten_a_new_one() -> None:
    storage = BoundedStorage(8)
    key = DHTID.generate(b"key")
    now_s = time.time()
    assert storage.store_subkey(key, "peer", b"new", now_s + 100)
    assert not storage.store_subkey(key, "peer", b"old", now_s + 50)
    entries = storage.get(key).value
    assert isinstance(entries, DictionaryDHTValue)
    assert entries.key_to_heap["peer"].expiration_time == now_s + 100
    for number in range(SUBKEYS_MAX + 10):
        storage.store_subkey(key, f"peer {number}", b"x", now_s + 10 + number)
    assert len(storage.get(key).value) == SUBKEYS_MAX
    for number in range(20):
        storage.store(DHTID.generate(b"%d" % number), b"x", now_s + 200)
    assert len(storage) == 8
