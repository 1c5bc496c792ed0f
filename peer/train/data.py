"""Text from files, cut into numbered blocks of samples; and the stream of one peer's own blocks.

A block is a *range of the text*, not of the tokens, so opening a corpus of any size costs only a
look at its files: text is read and tokenised when a block is asked for. Documents inside a block
are joined by the end mark and cut into samples of T tokens; what is left over is dropped.

Held-out blocks are chosen by hash and have no number among the training blocks. The built-in
`stdlib` text differs between Python versions, so there whole files are held out by their names:
what one peer validates on, no other peer trains on.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import logging
import os
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from peer.errors import DataError
from peer.train.tokens import Tokenizer

logger = logging.getLogger(__name__)

BLOCKS_MAX: Final = 2**18  # larger corpora get larger blocks; so many are hashed in 0.3 s
PROBE_BYTES: Final = 2**18  # looked at in each file before training, to see whether it is text
LINE_BYTES_MAX: Final = 2**24  # a longer "line" of JSONL is no JSONL

_STDLIB_BYTES_MAX: Final = 16 * 2**20
_STDLIB_HELD_OUT: Final = 0.03
_STDLIB_SKIPPED: Final = frozenset({
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings",
    "lib2to3", "idlelib", "turtledemo", "ensurepip", "lib-dynload", "config",
})  # fmt: skip


class Corpus(Protocol):
    """Text by position. Positions are bytes or rows, whatever is cheap to find."""

    length: int
    bytes_per_position: float

    def documents(self, start: int, stop: int) -> list[str]:
        """The documents, or parts of them, at positions start..stop-1.

        Raises:
            DataError: what is there can't be read.
        """


class TextFiles:
    """Files end to end; positions are bytes. A file is a document."""

    bytes_per_position = 1.0

    def __init__(self, files: Sequence[Path], *, check: bool = True) -> None:
        """`check`: look into each file whether it is text.

        Raises:
            DataError: a file is missing, empty or not text.
        """
        self._files = list(files)
        sizes = [_size(file) for file in self._files]
        self._ends = list(itertools.accumulate(sizes))
        self.length = self._ends[-1] if self._ends else 0
        if check:
            for file in self._files:
                _require_text(file)

    def documents(self, start: int, stop: int) -> list[str]:
        return [
            part.decode("utf-8", "replace") for part in self.pieces(start, stop) if part.strip()
        ]

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of each file in the range; cuts inside a UTF-8 letter move forward."""
        index = bisect.bisect_right(self._ends, start)
        while index < len(self._files) and start < stop:
            first = self._ends[index - 1] if index else 0
            last = min(stop, self._ends[index])
            yield _read_letters(self._files[index], start - first, last - first)
            start = self._ends[index]
            index += 1


class JsonLines:
    """Files of one JSON record a line; positions are bytes. A line belongs where it starts."""

    bytes_per_position = 1.0

    def __init__(self, files: Sequence[Path], fields: Sequence[str]) -> None:
        """Looks at the first record of each file.

        Raises:
            DataError: a file is missing, empty, not text, or its records lack the fields.
        """
        self._files = list(files)
        self._fields = list(fields)
        self.skipped = 0
        """Records left out because they could not be read."""
        self._ends = list(itertools.accumulate(_size(file) for file in self._files))
        self.length = self._ends[-1] if self._ends else 0
        for file in self._files:
            _require_text(file)
            head = _read_lines(file, 0, PROBE_BYTES).split(b"\n")
            self._parse(next(line for line in head if line.strip()), file)

    def documents(self, start: int, stop: int) -> list[str]:
        found = []
        for index, file in enumerate(self._files):
            first = self._ends[index - 1] if index else 0
            if self._ends[index] <= start or first >= stop:
                continue
            raw = _read_lines(file, max(start - first, 0), min(stop, self._ends[index]) - first)
            for line in raw.split(b"\n"):
                try:
                    if line.strip():
                        found.append(self._parse(line, file))
                except DataError as error:  # one bad record among millions must not end the work
                    if not self.skipped:
                        logger.warning("left out: %s (further ones are left out in silence)", error)
                    self.skipped += 1
        return found

    def _parse(self, line: bytes, file: Path) -> str:
        try:
            record = json.loads(line)
            parts = [record[name] for name in self._fields]
        except (ValueError, RecursionError):
            raise DataError(
                f"{file}: a line is not JSON ({line[:40]!r}...); write one record a line"
            ) from None
        except (KeyError, TypeError, IndexError):
            known = ", ".join(list(record)[:8]) if isinstance(record, dict) else "none"
            raise DataError(
                f"{file}: a record lacks {' or '.join(self._fields)} (it has {known}); "
                "set data.fields"
            ) from None
        return _join(parts, str(file))


class Rows:
    """A table by row number: Parquet files, or a data set from the hub."""

    def __init__(
        self,
        length: int,
        read: Callable[[int, int], list[list[Any]]],
        where: str,
    ) -> None:
        """`read(start, stop)` gives rows, each the list of its fields."""
        self.length = length
        self._read = read
        self._where = where
        probe = self.documents(0, min(length, 16))
        sizes = [len(text.encode("utf-8", "replace")) for text in probe]
        self.bytes_per_position = max(1.0, sum(sizes) / max(1, len(sizes)))

    def documents(self, start: int, stop: int) -> list[str]:
        return [_join(row, self._where) for row in self._read(start, stop)]


class Blocks:
    """A corpus as training blocks and held-out samples. Implements `DataSource`."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        block_samples: int,
        validation_share: float,
        validation_samples: int,
        held_out: Corpus | None = None,
        where: str = "the data",
    ) -> None:
        """`held_out`: a corpus of its own to validate on, instead of a share of the blocks.

        Raises:
            DataError: there is not enough text for one sample to train on and one to validate on.
        """
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._T = sequence_length
        self._validation_samples = validation_samples
        bytes_per_block = float(block_samples * sequence_length * tokenizer.bytes_per_token)
        # Small data is cut finer: several peers can share it, and some can be held out.
        whole = corpus.length * corpus.bytes_per_position
        sample_bytes = sequence_length * tokenizer.bytes_per_token
        bytes_per_block = max(min(bytes_per_block, whole / 16), 2 * sample_bytes)
        self._width = max(
            1, int(bytes_per_block / corpus.bytes_per_position), -(-corpus.length // BLOCKS_MAX)
        )
        count = -(-corpus.length // self._width)
        self._held_out: list[tuple[Corpus, int]] = []
        if held_out is None:
            chosen = {b for b in range(count) if _hash(f"held out/{b}") < validation_share}
            if not chosen and count:
                chosen = {min(range(count), key=lambda b: _hash(f"held out/{b}"))}
            self._held_out = [(corpus, b) for b in sorted(chosen)]
            self._numbers = [b for b in range(count) if b not in chosen]
        else:
            self._held_out = [(held_out, b) for b in range(-(-held_out.length // self._width))]
            self._numbers = list(range(count))
        self.blocks = len(self._numbers)
        self._validation: list[torch.Tensor] | None = None
        enough = any(self._cut(corpus, b) for b in self._numbers[:64])
        if not enough or not self.validation():
            raise DataError(
                f"{where}: too little text for samples of {sequence_length} tokens; give more "
                "text or a smaller data.sequence_length"
            )

    def block(self, index: int, epoch: int) -> list[torch.Tensor]:
        """The samples of a block, each (T,) int64; `epoch` shuffles their order."""
        samples = self._cut(self._corpus, self._numbers[index])
        random.Random(f"{epoch}/{index}").shuffle(samples)
        return samples

    def validation(self) -> list[torch.Tensor]:
        """Held-out samples (T,), spread evenly over all that is held out."""
        if self._validation is None:
            per_block = max(1, -(-self._validation_samples // max(1, len(self._held_out))))
            stride = max(1, len(self._held_out) * per_block // self._validation_samples)
            found: list[torch.Tensor] = []
            for corpus, number in self._held_out[::stride]:
                found += self._cut(corpus, number)[:per_block]
            self._validation = found[: self._validation_samples]
        return self._validation

    def _cut(self, corpus: Corpus, number: int) -> list[torch.Tensor]:
        start = number * self._width
        ids: list[int] = []
        for text in corpus.documents(start, min(start + self._width, corpus.length)):
            ids += self._tokenizer.encode(text)
            if self._tokenizer.end is not None:
                ids.append(self._tokenizer.end)
        tokens = torch.tensor(ids, dtype=torch.int64)
        return list(tokens[: len(ids) // self._T * self._T].view(-1, self._T).unbind())


def stdlib_files() -> tuple[list[Path], list[Path]]:
    """This Python's own modules: (to train on, held out), split by the hash of their names.

    Raises:
        DataError: this Python carries no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[tuple[float, str, Path]] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_SKIPPED]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            name = path.relative_to(root).as_posix()
            found.append((_hash(name), name, path))
    train: list[Path] = []
    held_out: list[Path] = []
    total = 0
    for _, name, path in sorted(found):
        size = path.stat().st_size
        if size and total + size <= _STDLIB_BYTES_MAX:
            total += size
            (held_out if _hash(f"held out/{name}") < _STDLIB_HELD_OUT else train).append(path)
    if not train or not held_out:
        raise DataError(
            f"{root}: this Python carries no sources to train on; name text files with --data"
        )
    return train, held_out


def parquet_rows(files: Sequence[Path], columns: Sequence[str]) -> Rows:
    """The named columns of Parquet files, row group by row group.

    Raises:
        DataError: a file is missing, empty or no Parquet, or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    groups: list[tuple[Path, int]] = []
    counts: list[int] = []
    for file in files:
        _size(file)
        try:
            about = pyarrow.parquet.read_metadata(file)
            known = pyarrow.parquet.read_schema(file).names
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file}: not Parquet ({error}); name another file") from None
        for column in columns:
            if column not in known:
                raise DataError(
                    f"{file}: has no column {column!r} (it has {', '.join(known[:8])}); "
                    "set data.fields"
                )
        for number in range(about.num_row_groups):
            groups.append((file, number))
            counts.append(about.row_group(number).num_rows)
    ends = list(itertools.accumulate(counts))
    cached: tuple[int, list[list[Any]]] = (-1, [])

    def group(index: int) -> list[list[Any]]:
        nonlocal cached
        if cached[0] != index:
            file, number = groups[index]
            try:
                with pyarrow.parquet.ParquetFile(file) as opened:
                    table = opened.read_row_group(number, columns=list(columns), use_threads=False)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{file}: can't be read ({error}); restore the file") from None
            lists = [table.column(name).to_pylist() for name in columns]
            cached = (index, [list(row) for row in zip(*lists, strict=True)])
        return cached[1]

    def read(start: int, stop: int) -> list[list[Any]]:
        rows: list[list[Any]] = []
        index = bisect.bisect_right(ends, start)
        while index < len(groups) and start < stop:
            first = ends[index - 1] if index else 0
            rows += group(index)[start - first : stop - first]
            start = ends[index]
            index += 1
        return rows

    return Rows(ends[-1] if ends else 0, read, str(files[0]))


def hub_rows(dataset: str, subset: str, split: str, columns: Sequence[str]) -> Rows:
    """A split of a data set on the Hugging Face hub; downloads what is not cached.

    Raises:
        DataError: the extra is not installed, or there is no such data set or column.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            "this run's data comes from the Hugging Face hub, which needs an extra; install it "
            "with: pip install 'murmuration[hub]'"
        ) from None
    if Path(dataset).exists():  # the library would read the local folder instead
        raise DataError(f"{dataset}: a folder of this name is in the way; start elsewhere")
    try:
        table: Any = load_dataset(dataset, subset or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{dataset}: can't be loaded ({error}); check its name") from None
    for column in columns:
        if column not in table.column_names:
            known = ", ".join(table.column_names[:8])
            raise DataError(f"{dataset}: has no field {column!r} (it has {known}); set data.fields")

    def read(start: int, stop: int) -> list[list[Any]]:
        part = table[start:stop]
        return [list(row) for row in zip(*(part[name] for name in columns), strict=True)]

    return Rows(len(table), read, dataset)


def _hash(text: str) -> float:
    """0..1, the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64


def _join(parts: Sequence[Any], where: str) -> str:
    if not all(isinstance(part, str | int | float | None) for part in parts):
        raise DataError(f"{where}: a field is a list or a table, not text; set data.fields")
    return "\n".join("" if part is None else str(part) for part in parts)


def _size(file: Path) -> int:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise _unreadable(file, error) from None
    if size == 0:
        raise DataError(f"{file}: the file is empty; name one with text in it")
    return size


def _require_text(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            probe = opened.read(PROBE_BYTES)
    except OSError as error:
        raise _unreadable(file, error) from None
    try:
        text = probe[: _letter_start(probe, len(probe))].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 text (byte {error.start}); convert it or name another file"
        ) from None
    if "\0" in text:
        raise DataError(f"{file}: not text (it holds zero bytes); name another file")
    if not text.strip():
        raise DataError(f"{file}: nothing but blanks; name a file with text in it")


def _letter_start(data: bytes, index: int) -> int:
    """The first index at or after `index` that is not inside a UTF-8 letter."""
    while index < len(data) and data[index] & 0xC0 == 0x80:
        index += 1
    return min(index, len(data))


def _read_letters(file: Path, start: int, stop: int) -> bytes:
    """Bytes start..stop-1, both ends moved forward to the next letter's beginning."""
    try:
        with file.open("rb") as opened:
            opened.seek(start)
            data = opened.read(stop - start + 3)
    except OSError as error:
        raise _unreadable(file, error) from None
    first = _letter_start(data, 0) if start else 0
    return data[first : _letter_start(data, stop - start)]


def _read_lines(file: Path, start: int, stop: int) -> bytes:
    """The lines that begin at bytes start..stop-1, whole."""
    try:
        with file.open("rb") as opened:
            if start:
                opened.seek(start - 1)
                opened.readline(LINE_BYTES_MAX)
            begin = opened.tell()
            if begin >= stop:
                return b""
            data = opened.read(stop - begin)
            return data if data.endswith(b"\n") else data + opened.readline(LINE_BYTES_MAX)
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(f"{file}: can't be read ({error.strerror}); correct the path or the file")
