"""hivemind's hooks for our rules: on what others store here, on what we read, on how much is kept.

hivemind 1.1.12 asks a validator about every entry, but keeps any number of them, refuses a whole
shard for one bad entry, believes the expiry that a replica claims for it (which ends a search
early), and lets an old record, sent again, pull the end of the new one forward. `guard` mends that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Any, Final

import msgpack
from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.utils.timed_storage import ValueWithExpiration

from dht.rules import CELL_ENTRIES_MAX, RUNS_SHOWN_MAX, Rules
from protocols import limits

KEYS_MAX: Final = 4096  # half a key per peer and replica; at worst 64 KiB or a full cell each
CACHED_KEYS_MAX: Final = 64
SUBKEYS_MAX: Final = max(RUNS_SHOWN_MAX, CELL_ENTRIES_MAX)
NEIGHBOURS_MAX: Final = 20  # a bucket; an honest reply has no more per key


class Validator(RecordValidatorBase):  # type: ignore[misc]
    """Our rules, for hivemind."""

    def __init__(self, rules: Rules, clock: Callable[[], float] = time.time) -> None:
        self._rules = rules
        self._clock = clock

    def validate(self, record: DHTRecord) -> bool:
        value = _plain(record.value, limits.MANIFEST_BYTES_MAX)
        subkey = _plain(record.subkey, 64)
        if not isinstance(value, bytes) or not isinstance(subkey, str | None):
            return False
        if not isinstance(record.expiration_time, float):
            return False
        return self._rules.allow(record.key, subkey, value, record.expiration_time, self._clock())


class BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
    """Keeps at most so many keys and subkeys, soonest to expire dropped first."""

    def store(
        self, key: Any, value: Any, expiration_time: float, subkey: str | None = None
    ) -> bool:
        if subkey is not None:
            return self.store_subkey(key, subkey, value, expiration_time)
        known = self.get(key)
        if known is not None and known.expiration_time >= expiration_time:
            return bool(known == (value, expiration_time))
        return bool(super().store(key, value, expiration_time))

    def store_subkey(self, key: Any, subkey: str, value: bytes, expiration_time: float) -> bool:
        entries = self.get(key)
        if entries is not None and isinstance(entries.value, DictionaryDHTValue):
            known = entries.value.get(subkey)
            if known is not None and known.expiration_time >= expiration_time:
                return bool(known == (value, expiration_time))
        taken = bool(super().store_subkey(key, subkey, value, expiration_time))
        if taken and (entries := self.get(key)) is not None:
            entries.value.maxsize = SUBKEYS_MAX
        return taken


def guard(protocol: Any, storage: BoundedStorage | None = None) -> BoundedStorage:
    """Put our bounds around hivemind's DHTProtocol; gives its storage, to be kept over restarts."""
    validator = protocol.record_validator
    original_find = protocol.call_find
    serializer = protocol.serializer

    def only_valid(key: bytes, entries: Any) -> bool:
        """Drop the bad entries of a shard instead of refusing it whole."""
        with entries.freeze():
            items = list(entries.items())
        for index, (subkey, (value, expires_s)) in enumerate(items):
            record = DHTRecord(key, serializer.dumps(subkey), value, expires_s)
            if (
                index >= SUBKEYS_MAX
                or not isinstance(subkey, str)
                or not isinstance(value, bytes)
                or not validator.validate(record)
            ):
                del entries[subkey]
        return True

    async def call_find(peer: Any, keys: Any) -> Any:
        found = await original_find(peer, keys)
        if not found:
            return found
        return {
            key: (_honest(value), dict(islice(neighbours.items(), NEIGHBOURS_MAX)))
            for key, (value, neighbours) in found.items()
        }

    protocol.storage = BoundedStorage(KEYS_MAX) if storage is None else storage
    protocol.cache = BoundedStorage(CACHED_KEYS_MAX)
    protocol._validate_dictionary = only_valid
    protocol.call_find = call_find
    kept: BoundedStorage = protocol.storage
    return kept


def _honest(found: Any) -> Any:
    """What a replica sent, with the expiry that its entries really have."""
    if found is None or not isinstance(found.value, DictionaryDHTValue):
        return found
    entries = DictionaryDHTValue(SUBKEYS_MAX)
    for subkey, (value, expires_s) in found.value.items():
        entries.store(subkey, value, expires_s)
    if not entries:
        return None
    return ValueWithExpiration(entries, entries.latest_expiration_time)


def _plain(data: object, bytes_max: int) -> object:
    """One msgpack string, bytes or nil; anything else becomes False."""
    if not isinstance(data, bytes) or len(data) > bytes_max + 8:
        return False
    try:
        value: object = msgpack.unpackb(
            data, max_array_len=0, max_map_len=0, max_ext_len=0, strict_map_key=True
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError):
        return False
    return value
