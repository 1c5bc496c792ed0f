"""The log of seeds and scalars: what was learned, complete, in a hundred bytes per peer and round.

Record n holds the signed entries of round n. Heads chain the records:

    head_0 = hash of the rules        head_n+1 = SHA-256(head_n, record n)

so a head names a whole history, and two peers with the same head hold the same values: base and log
are the checkpoint. Everybody checks every entry's signature, which binds it to the head that it was
measured at; whoever passes a bad record on is named.

A record may *ban* peers: from then on none of their entries count, the earlier ones included, and
the values are those of a run that never counted them (`without` shows the same beforehand). The
others' scalars stay as they were measured, and their weights are taken relative to what is left.

For late joiners a log is compacted to a *summary*: only what each direction is multiplied with.
It yields the same bits, but nobody can be taken out of it any more.

Pure: bytes in, numbers out. `seedfile` keeps it on disk, `zeroth` replays it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Final, Self

import numpy as np

from peer.finetune import decomfl, kseed, scalars
from peer.finetune.decomfl import Factors
from peer.finetune.kseed import Sums
from peer.finetune.scalars import Reading
from peer.finetune.seed_rules import POOL_MAX, SeedRules
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.identity import peer_id_of, public_key_of
from protocols.schema import Exactly, Max, SchemaError, pack, unpack
from protocols.types import PeerId

ENTRIES_MAX: Final = 256  # sixteen groups of sixteen: with FedKSeed 2.2 MiB in a record
ENTRY_BYTES_MAX: Final = 4 + POOL_MAX // 8 + 2 * POOL_MAX + 64
RECORD_BYTES_MAX: Final = ENTRIES_MAX * (ENTRY_BYTES_MAX + 64) + 4096
BANS_MAX: Final = 16  # in one record
BANNED_MAX: Final = 4096  # in a log: 128 KiB of names
ROUNDS_MAX: Final = 2**24  # of a summary: 16 scalars each are 1 GiB
SUMMARY_BYTES_MAX: Final = 256 * 2**20

_Key = Annotated[bytes, Exactly(32)]


@dataclass(frozen=True, slots=True)
class SignedEntry:
    """What one peer sent in a round (`scalars`)."""

    author: _Key
    """Its Ed25519 public key."""
    entry: Annotated[bytes, Max(ENTRY_BYTES_MAX)]


@dataclass(frozen=True, slots=True)
class SeedRecord:
    """A round. `entries` and `bans` are in order of the keys, each key once."""

    number: Annotated[int, Max(scalars.ROUND_MAX)]
    entries: Annotated[tuple[SignedEntry, ...], Max(ENTRIES_MAX)]
    bans: Annotated[tuple[_Key, ...], Max(BANS_MAX)]


@dataclass(frozen=True, slots=True)
class SeedSummary:
    """What the first `rounds` records of a log come to."""

    genesis: _Key
    head: _Key
    """After these records."""
    rounds: Annotated[int, Max(ROUNDS_MAX)]
    banned: Annotated[tuple[_Key, ...], Max(BANNED_MAX)]
    """Who is not in it, in order of the keys."""
    numbers: Annotated[bytes, Max(SUMMARY_BYTES_MAX)]
    """decomfl: float32 (rounds, K * P), the factors of each round's directions; kseed: float64
    (pool,), the sums. Little-endian."""

    def content(self) -> bytes:
        """SHA-256 (32 bytes) of it: what peers compare, for a head does not vouch for a summary."""
        return hashlib.sha256(b"murmuration/seedsummary/1" + pack(self)).digest()


class SeedLog:
    """The records of a run, from its base or from a summary on. Grows by `append` alone."""

    def __init__(self, rules: SeedRules, summary: SeedSummary | None = None) -> None:
        """A log without records, or one that goes on after `summary`.

        Raises:
            ValueError: the summary is another run's or not of the size that the rules make.
        """
        self.rules = rules
        self.summary_before = summary
        self._without: frozenset[bytes] = frozenset()
        self._raw: list[bytes] = []
        self._size = 0
        self._heads = [rules.genesis if summary is None else summary.head]
        self._banned: frozenset[bytes] = frozenset()
        if summary is not None:
            _check_summary(rules, summary)
            self._banned = frozenset(summary.banned)

    @property
    def first(self) -> int:
        """The number of the first record here: those before are in the summary."""
        return 0 if self.summary_before is None else self.summary_before.rounds

    @property
    def next(self) -> int:
        """The number of the record that comes next."""
        return self.first + len(self._raw)

    @property
    def head(self) -> bytes:
        """What names the history so far, and what the next round's entries are signed for."""
        return self._heads[-1]

    @property
    def banned(self) -> frozenset[PeerId]:
        """Whose entries do not count."""
        return frozenset(map(peer_id_of, self._banned | self._without))

    @property
    def size(self) -> int:
        """Bytes of all the records here, without the summary before them."""
        return self._size

    def record(self, number: int) -> bytes:
        """A record's bytes, as they go over the wire and onto disk."""
        return self._raw[number - self.first]

    def head_before(self, number: int) -> bytes:
        """The head that record `number` follows."""
        return self._heads[number - self.first]

    # ── growing ──────────────────────────────────────────────────────────────────────────────
    def make(self, entries: Mapping[PeerId, bytes], bans: Sequence[PeerId] = ()) -> bytes:
        """The next record out of entries that came in. Whoever has the same makes the same."""
        return record_of(self.next, entries, bans)

    def append(self, sender: PeerId, raw: bytes) -> bool:
        """Take the next record in, which `sender` passed on. Whether the values must be rebuilt
        from the base, because somebody was banned.

        Cost: a signature's verification for each entry.

        Raises:
            RemoteProtocolError: naming `sender`, and the entry where one is to blame: it is not
                the next record (a gap), not canonical, or has an entry that is not what its
                author signed for this state. Nothing has changed.
        """
        record = self.check(sender, raw)
        self.take(raw, record)
        return bool(record.bans)

    def check(self, sender: PeerId, raw: bytes) -> SeedRecord:
        """What `append` checks, and nothing taken in yet."""
        where = f"record {self.next} of the seed log"
        try:
            if len(raw) > RECORD_BYTES_MAX:
                raise SchemaError(f"{len(raw)} bytes, at most {RECORD_BYTES_MAX} allowed")
            record = unpack(SeedRecord, raw)
        except SchemaError as error:
            raise RemoteProtocolError(sender, f"{where}: {error}") from None
        if record.number != self.next:
            raise RemoteProtocolError(sender, f"{where}: got number {record.number}, a gap")
        authors = [signed.author for signed in record.entries]
        for keys in (authors, list(record.bans)):
            if any(one >= two for one, two in pairwise(keys)):
                raise RemoteProtocolError(sender, f"{where}: keys out of order or given twice")
        if pack(record) != raw:
            raise RemoteProtocolError(sender, f"{where}: another spelling of its content")
        if len(self._banned.union(record.bans)) > BANNED_MAX:
            raise RemoteProtocolError(sender, f"{where}: more than {BANNED_MAX} peers banned")
        for signed in record.entries:
            author = peer_id_of(signed.author)
            try:
                scalars.decode(self.rules, author, self.head, record.number, signed.entry)
            except RemoteProtocolError as error:
                raise RemoteProtocolError(sender, f"{where}: {author}'s {error.reason}") from None
        return record

    def take(self, raw: bytes, record: SeedRecord) -> None:
        """Take in what `check` gave for the same bytes."""
        self._raw.append(raw)
        self._size += len(raw)
        self._heads.append(chain(self.head, raw))
        self._banned = self._banned.union(record.bans)

    def load(self, raw: bytes) -> None:
        """Take in what this peer itself once checked and kept: signatures are not looked at.

        Raises:
            ValueError: it is not the next record.
        """
        record = unpack(SeedRecord, raw)
        if record.number != self.next:
            raise ValueError(f"record {record.number} where {self.next} belongs")
        self.take(raw, record)

    def verify(self) -> None:
        """Check every record again, signatures included.

        Raises:
            RemoteProtocolError: naming the author of the first entry that is wrong.
        """
        again = SeedLog(self.rules, self.summary_before)
        for raw in self._raw:
            record = unpack(SeedRecord, raw)
            for signed in record.entries:
                author = peer_id_of(signed.author)
                scalars.decode(self.rules, author, again.head, record.number, signed.entry)
            again.take(raw, record)
        if again.head != self.head:
            raise LocalProtocolError("the log's heads are not those of its records")

    # ── reading ──────────────────────────────────────────────────────────────────────────────
    def readings(self, number: int) -> list[Reading]:
        """The entries of a round that count: those of nobody who is banned, then or later."""
        record = unpack(SeedRecord, self.record(number))
        out = self._banned | self._without
        return [
            scalars.read(self.rules, peer_id_of(signed.author), number, signed.entry)
            for signed in record.entries
            if signed.author not in out
        ]

    def without(self, *peers: PeerId) -> Self:
        """The same log as if it had never counted these peers; the two grow apart from here.

        Raises:
            ValueError: part of the log is only a summary, which nobody can be taken out of.
        """
        keys = frozenset(map(public_key_of, peers))
        if self.summary_before is not None and not keys <= self._banned:
            raise ValueError("the log begins with a summary: fetch all of it to take a peer out")
        view = type(self)(self.rules, self.summary_before)
        view._raw, view._heads = self._raw.copy(), self._heads.copy()
        view._banned, view._size = self._banned, self._size
        view._without = self._without | keys
        return view

    def factors(self, number: int) -> Factors:
        """decomfl: what round `number`'s directions are multiplied with. Also of rounds that only
        the summary has.

        Raises:
            ValueError: a ban reaches into the summary.
        """
        if number >= self.first:
            return decomfl.factors_of(self.rules, decomfl.reduce(self.rules, self.readings(number)))
        summary = self._whole_summary()
        assert summary is not None
        size = 4 * self.rules.scalars
        row: Factors = np.frombuffer(summary.numbers[number * size :][:size], "<f4")
        return row.astype(np.float32)

    def sums(self, upto: int | None = None, since: tuple[int, Sums] | None = None) -> Sums:
        """kseed: each direction's sum after the first `upto` records (all). `since`: the sums
        after so many, to go on from.

        Raises:
            ValueError: a ban reaches into the summary.
        """
        start, sums_K = since or (self.first, self._first_sums())
        for number in range(start, self.next if upto is None else upto):
            sums_K = kseed.add(self.rules, sums_K, self.readings(number))
        return sums_K

    def summary(self) -> SeedSummary:
        """All of the log, compacted. Whoever has the same log makes the same bytes.

        Raises:
            ValueError: a ban reaches into the summary that it began with.
        """
        if self.rules.method == "kseed":
            numbers = self.sums().astype("<f8").tobytes()
        else:
            numbers = b"".join(self.factors(n).astype("<f4").tobytes() for n in range(self.next))
        banned = tuple(sorted(self._banned | self._without))
        return SeedSummary(self.rules.genesis, self.head, self.next, banned, numbers)

    def _first_sums(self) -> Sums:
        summary = self._whole_summary()
        if summary is None:
            return np.zeros(self.rules.pool)
        return np.frombuffer(summary.numbers, "<f8").astype(np.float64)

    def _whole_summary(self) -> SeedSummary | None:
        summary = self.summary_before
        if summary is not None and self._banned - set(summary.banned):
            raise ValueError(
                "a peer was banned that may be in the summary: fetch the whole log, or a newer one"
            )
        return summary


def record_of(number: int, entries: Mapping[PeerId, bytes], bans: Sequence[PeerId] = ()) -> bytes:
    """Record `number` out of entries that came in. Whoever has the same makes the same."""
    rows = sorted((public_key_of(peer), entry) for peer, entry in entries.items())
    keys = tuple(sorted(map(public_key_of, set(bans))))
    return pack(SeedRecord(number, tuple(SignedEntry(*row) for row in rows), keys))


def chain(head: bytes, raw: bytes) -> bytes:
    """The head after a record."""
    return hashlib.sha256(b"murmuration/seedlog/1" + head + raw).digest()


def _check_summary(rules: SeedRules, summary: SeedSummary) -> None:
    if summary.genesis != rules.genesis:
        raise ValueError("the summary is of another run")
    kseeds = rules.method == "kseed"
    size = 8 * rules.pool if kseeds else 4 * rules.scalars * summary.rounds
    if len(summary.numbers) != size:
        raise ValueError(f"the summary has {len(summary.numbers)} bytes of numbers, not {size}")
    if not np.isfinite(np.frombuffer(summary.numbers, "<f8" if kseeds else "<f4")).all():
        raise ValueError("the summary has a number that is not finite")
    if any(one >= two for one, two in pairwise(summary.banned)):
        raise ValueError("the summary's banned peers are out of order")
