"""A state on its way, on disk: what has come of it survives a restart.

One file holds the canonical bytes, each chunk at its place, and another says which state they are
meant to be. Nothing in the first is believed: whoever goes on hashes its chunks and keeps those
that the state on order has, be it the same one or a later one with some chunks alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from peer.home import complain, make_folder, remove_temporaries, write_atomic
from peer.state_chunks import Arrays, StateGrid, leaf_of
from protocols.messages import Counter
from protocols.records import DigestField
from protocols.schema import SchemaError, pack, unpack
from protocols.types import Digest

KEPT_BYTES_MIN: Final = 16 * 2**20  # a smaller state comes again sooner than it is looked for
NOTE_BYTES_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class _Note:
    round: Counter
    digest: DigestField


class Incoming:
    """At most one state in a folder. Every method waits for the disk: call it from a thread.

    All raise StorageError if the disk is full, or may not be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = self._folder = folder
        self._chunks = folder / "state.chunks"
        self._note = folder / "state.note"

    def keeps(self, grid: StateGrid) -> bool:
        """Whether a state of this size is worth it."""
        return grid.bytes >= KEPT_BYTES_MIN

    def on_order(self) -> tuple[int, Digest] | None:
        """(round, digest) of the state whose chunks are here."""
        try:
            with self._note.open("rb") as file:
                note = unpack(_Note, file.read(NOTE_BYTES_MAX))
        except (FileNotFoundError, SchemaError):
            return None
        except OSError as error:
            complain(error, self._note, "read")
        return (note.round, Digest(note.digest)) if self._chunks.exists() else None

    def begin(self, grid: StateGrid, number: int, digest: Digest) -> None:
        """Chunks of this state come from now on; those that are here stay until they are
        overwritten."""
        make_folder(self._folder)
        with self._opened(os.O_RDWR | os.O_CREAT) as file:
            os.ftruncate(file, grid.bytes)  # takes no room before it is written
        write_atomic(self._note, pack(_Note(number, digest)))

    def put(self, grid: StateGrid, index: int, data: bytes | memoryview) -> None:
        with self._opened(os.O_WRONLY) as file:
            os.pwrite(file, data, grid.chunks[index].offset)

    def take(self, grid: StateGrid, leaves: Sequence[bytes], arrays: Arrays) -> list[int]:
        """Copy those chunks that are here and have these hashes into `arrays`; their numbers."""
        found: list[int] = []
        try:
            with self._opened(os.O_RDONLY) as file:
                for index, chunk in enumerate(grid.chunks):
                    data = os.pread(file, len(chunk), chunk.offset)
                    if leaf_of(data) == leaves[index]:
                        grid.view(arrays, index)[:] = data
                        found.append(index)
        except FileNotFoundError:
            pass
        return found

    def clear(self) -> None:
        """It has been taken, or is wanted no more."""
        remove_temporaries(self._folder)
        for path in (self._note, self._chunks):
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):
            self._folder.rmdir()

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        try:
            file = os.open(self._chunks, flags, 0o600)
            try:
                yield file
            finally:
                os.close(file)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and flags == os.O_RDONLY:
                raise
            complain(error, self._chunks, "write")
