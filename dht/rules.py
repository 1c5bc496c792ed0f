"""What may stand in the directory, whoever brings it and wherever it is kept.

Three kinds of entry, and nothing else:

    members    keys per run and cell (`protocols.cells`); subkey = peer id; value = a signed
               `PeerRecord`, which may stand only in the cells that follow from what it says
    manifests  one key per run; no subkey; value = bytes whose SHA-256 is the run
    runs       one key; subkey = peer id; value = a signed `RunEntry`

Storage sees only a key's 20-byte hash, so every value carries its own claim (run, peer, content):
the key is computed again from the value and has to be the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final

from dht.directory import RunNotice
from protocols import limits
from protocols.cells import cells_of
from protocols.identity import Signer, verify
from protocols.records import NameField, PeerRecord, RunIdField, Signed, read_record, sign
from protocols.schema import Max, SchemaError, pack, unpack
from protocols.types import PeerId, RunId

RUN_DOMAIN: Final = "run"
NOTICE_TTL_S: Final = 300.0  # manifests and run entries
NOTICE_REFRESH_S: Final = 25.0
"""How often they are stored again, give or take a fifth: nodes that come back know nothing, and so
long newcomers find no run through them."""
RUNS_SHOWN_MAX: Final = 1024  # announcers of runs that one node keeps
CELL_ENTRIES_MAX: Final = 512  # a rush of newcomers stands in the root until it shows crowded
VERIFIED_MAX: Final = 2 * limits.KNOWN_PEERS_MAX  # remembered signatures, about 8 MiB
RUNS_KEY: Final = b"murmuration/1/runs"


@dataclass(frozen=True, slots=True)
class RunEntry:
    """Its signer says that `run` exists and is called `name`."""

    run: RunIdField
    name: NameField
    expires_ms: Annotated[int, Max(2**48)]


def members_key(run: RunId, cell: str) -> bytes:
    return f"murmuration/1/{run}/members/{cell}".encode()


def manifest_key(run: RunId) -> bytes:
    return f"murmuration/1/manifest/{run}".encode()


def key_id(key: bytes) -> bytes:
    """What storage sees of a key: 20 bytes."""
    return hashlib.sha1(key, usedforsecurity=False).digest()


def sign_run_entry(signer: Signer, entry: RunEntry) -> bytes:
    return pack(sign(signer, RUN_DOMAIN, entry))


def read_run_entry(data: bytes) -> tuple[PeerId, RunEntry]:
    """(who says so, what).

    Raises:
        SchemaError: too large, malformed or wrongly signed.
    """
    if len(data) > limits.RECORD_BYTES_MAX:
        raise SchemaError(f"run entry of {len(data)} bytes")
    signed = unpack(Signed, data)
    if not verify(signed.signer, RUN_DOMAIN, signed.body, signed.signature):
        raise SchemaError(f"run entry: wrong signature of {signed.signer}")
    return signed.signer, unpack(RunEntry, signed.body)


def is_manifest_of(run: RunId, data: bytes) -> bool:
    return len(data) <= limits.MANIFEST_BYTES_MAX and hashlib.sha256(data).hexdigest() == run


def is_current(record: PeerRecord, now_s: float) -> bool:
    """Whether `record` is alive by a clock that may differ from its issuer's."""
    return record.issued_ms / 1000 <= now_s + limits.CLOCK_SKEW_S_MAX and _lives(
        record.expires_ms / 1000, now_s
    )


def count_runs(announced: Iterable[tuple[RunId, str]]) -> list[RunNotice]:
    """(run, name) per announcing peer -> the runs, most announced first, by their usual name."""
    counts = Counter(announced)
    names: dict[RunId, str] = {}
    peers: Counter[RunId] = Counter()
    for (run, name), count in counts.most_common():
        names.setdefault(run, name)
        peers[run] += count
    return [RunNotice(run, names[run], count) for run, count in peers.most_common()]


class Rules:
    """Says which entries are valid. Remembers the signatures it has checked: 0.2 ms each."""

    def __init__(self) -> None:
        self._records: OrderedDict[bytes, PeerRecord] = OrderedDict()
        self._entries: OrderedDict[bytes, tuple[PeerId, RunEntry]] = OrderedDict()
        self._places: OrderedDict[bytes, frozenset[bytes]] = OrderedDict()

    def record(self, data: bytes) -> PeerRecord:
        """`read_record`, but each signature is verified only once."""
        record = self._records.get(data)
        if record is None:
            record = read_record(data)
            self._records[data] = record
            if len(self._records) > VERIFIED_MAX:
                self._records.popitem(last=False)
        else:
            self._records.move_to_end(data)
        return record

    def places(self, data: bytes, record: PeerRecord) -> frozenset[bytes]:
        """The key ids under which `record`, whose bytes are `data`, may stand: about 50 hashes."""
        places = self._places.get(data)
        if places is None:
            places = frozenset(key_id(members_key(record.run, cell)) for cell in cells_of(record))
            self._places[data] = places
            if len(self._places) > RUNS_SHOWN_MAX:
                self._places.popitem(last=False)
        else:
            self._places.move_to_end(data)
        return places

    def run_entry(self, data: bytes) -> tuple[PeerId, RunEntry]:
        """`read_run_entry`, but each signature is verified only once."""
        entry = self._entries.get(data)
        if entry is None:
            entry = read_run_entry(data)
            self._entries[data] = entry
            if len(self._entries) > RUNS_SHOWN_MAX:
                self._entries.popitem(last=False)
        return entry

    def allow(
        self, key: bytes, subkey: str | None, value: bytes, expires_s: float, now_s: float
    ) -> bool:
        """Whether `value` may stand under `key` (its 20-byte id) until `expires_s` (since 1970).

        What is signed with its end must end exactly then: nobody can prolong another's record.
        """
        if not _lives(expires_s, now_s):
            return False
        if subkey is None:
            if len(value) > limits.MANIFEST_BYTES_MAX:
                return False
            return key == key_id(manifest_key(RunId(hashlib.sha256(value).hexdigest())))
        try:
            if key == key_id(RUNS_KEY):
                peer, entry = self.run_entry(value)
                return subkey == peer and expires_s == entry.expires_ms / 1000
            record = self.record(value)
        except SchemaError:
            return False
        return (
            subkey == record.peer
            and key in self.places(value, record)
            and expires_s == record.expires_ms / 1000
            and is_current(record, now_s)
        )


def _lives(expires_s: float, now_s: float) -> bool:
    latest_s = now_s + limits.RECORD_LIFETIME_S_MAX + limits.CLOCK_SKEW_S_MAX
    return now_s < expires_s <= latest_s
