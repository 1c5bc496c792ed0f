"""Files of chat rows: looked through once, then read by number.

A file is JSON Lines (a record a line) or one JSON list of records. Every row is read when the files
are opened, so that what is wrong with one is said then, with its name: `FILE:LINE`, or `FILE[N]` in
a list. Of the good ones only the place is kept, 40 bytes each.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from peer.errors import DataError
from peer.train.conversation import Example, RowError, read_row

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())  # who has no log shows `ChatRows.refused` instead

ROWS_MAX: Final = 2**22  # 160 MiB of places; the largest sets of instructions have a quarter of it
ROW_BYTES_MAX: Final = 2**24  # a book in one row is pretraining
LIST_BYTES_MAX: Final = 2**28  # a list is read whole, and takes some ten times that for a moment
REFUSED_KEPT: Final = 100  # names of refused rows; the rest is counted


class ChatRows:
    """The rows of some files, in order."""

    def __init__(
        self, files: Sequence[Path], check: Callable[[Example], None] | None = None
    ) -> None:
        """`check` may raise RowError for further reasons, such as a tokenizer's.

        Raises:
            DataError: a file is missing or has not one good row, or there are too many rows.
        """
        self.files = list(files)
        self.refused: list[str] = []
        """`FILE:LINE: why` of the first rows that nothing could be learned from."""
        self.refused_count = 0
        self._files, self._numbers = array("q"), array("q")
        self._starts, self._sizes = array("q"), array("q")
        self.fractions = array("d")
        """Of each row: `Example.fraction`."""
        self._listed = set[int]()
        for index, file in enumerate(self.files):
            self._look_through(index, file, check)

    def __len__(self) -> int:
        return len(self._starts)

    def bytes_of(self, row: int) -> int:
        """How long the row is on disk."""
        return self._sizes[row]

    def name(self, row: int) -> str:
        """`FILE:LINE`, or `FILE[N]` in a list."""
        return self._name(self._files[row], self._numbers[row])

    def file_of(self, row: int) -> Path:
        return self.files[self._files[row]]

    def read(self, rows: Sequence[int]) -> list[Example]:
        """These rows.

        Raises:
            DataError: a file is no longer what it was.
        """
        found = []
        opened, index = None, -1
        try:
            for row in rows:
                if index != self._files[row]:
                    if opened is not None:
                        opened.close()
                    index = self._files[row]
                    opened = self.files[index].open("rb")
                assert opened is not None
                opened.seek(self._starts[row])
                found.append(read_row(parse(opened.read(self._sizes[row]))))
        except (OSError, RowError) as error:
            raise DataError(f"{self.name(row)}: has changed ({error}); start again") from None
        finally:
            if opened is not None:
                opened.close()
        return found

    def refuse(self, name: str, why: str) -> None:
        """Count a row that nothing can be learned from; the first is said aloud."""
        if not self.refused_count:
            logger.warning("left out: %s: %s (further ones are left out in silence)", name, why)
        self.refused_count += 1
        if len(self.refused) < REFUSED_KEPT:
            self.refused.append(f"{name}: {why}")

    def _name(self, index: int, number: int) -> str:
        file = self.files[index]
        return f"{file}[{number}]" if index in self._listed else f"{file}:{number}"

    def _look_through(
        self, index: int, file: Path, check: Callable[[Example], None] | None
    ) -> None:
        before, refused = len(self), self.refused_count
        first = ""
        try:
            for number, start, raw in self._records(index, file):
                try:
                    example = read_row(parse(raw))
                    if check is not None:
                        check(example)
                except RowError as error:
                    first = first or f"{self._name(index, number)}: {error}"
                    self.refuse(self._name(index, number), str(error))
                    continue
                if len(self) >= ROWS_MAX:
                    raise DataError(f"{file}: more than {ROWS_MAX:,} rows in all; give fewer files")
                self._files.append(index)
                self._numbers.append(number)
                self._starts.append(start)
                self._sizes.append(len(raw))
                self.fractions.append(example.fraction())
        except OSError as error:
            raise DataError(
                f"{file}: can't be read ({error.strerror}); correct the path or the file"
            ) from None
        if len(self) == before:
            why = f"none of its {self.refused_count - refused:,} rows can be used; {first}"
            raise DataError(f"{file}: {why if first else 'the file is empty'}; mend the file")

    def _records(self, index: int, file: Path) -> Iterator[tuple[int, int, bytes]]:
        """(number from 1, first byte, bytes) of each record."""
        with file.open("rb") as opened:
            probe = opened.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
            opened.seek(0)
            if probe.startswith(b"["):
                self._listed.add(index)
                size = file.stat().st_size
                if size > LIST_BYTES_MAX:
                    raise DataError(
                        f"{file}: a list of {size:,} bytes, at most {LIST_BYTES_MAX:,} are read"
                        " whole; write one record a line"
                    )
                yield from _elements(file, opened.read())
                return
            start = number = 0
            while raw := opened.readline(ROW_BYTES_MAX):
                number += 1
                if raw.strip(b"\xef\xbb\xbf \t\r\n"):
                    yield number, start, raw
                start += len(raw)


def parse(raw: bytes) -> Any:
    """A record.

    Raises:
        RowError: it is not JSON.
    """
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise RowError(f"is not JSON ({raw[:40]!r}...); write one record a line") from None


def _elements(file: Path, data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The elements of a JSON list, by their bytes.

    Read as Latin-1 each character is a byte, and JSON's own signs are ASCII: so the decoder, which
    counts characters, tells bytes.
    """
    text, decoder = data.decode("latin-1"), json.JSONDecoder()
    at, number = text.index("[") + 1, 0
    blanks = " \t\r\n"

    def skip(at: int) -> int:
        while at < len(text) and text[at] in blanks:
            at += 1
        return at

    at = skip(at)
    while at < len(text) and text[at] != "]":
        number += 1
        try:
            _, stop = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            raise DataError(f"{file}[{number}]: is not JSON; mend the file") from None
        yield number, at, data[at:stop]
        at = skip(stop)
        if at < len(text) and text[at] == ",":
            at = skip(at + 1)
        elif at >= len(text) or text[at] != "]":
            raise DataError(f"{file}[{number}]: no comma or ] after it; mend the file")
    if at >= len(text):
        raise DataError(f"{file}: the list has no end; mend the file")
