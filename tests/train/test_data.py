"""Blocks are disjoint, held-out text stays held out, and bad files are named."""

from __future__ import annotations

import json
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peer.errors import DataError
from peer.manifest import DataSpec
from peer.train import build_data
from peer.train.data import Blocks, JsonLines, TextFiles, hub_rows, stdlib_files
from peer.train.tokens import ByteTokenizer
from tests.train.tiny import manifest


def _blocks(corpus: Any, **changes: Any) -> Blocks:
    options: dict[str, Any] = {
        "sequence_length": 16, "block_samples": 4, "validation_share": 0.1,
        "validation_samples": 8, **changes,
    }  # fmt: skip
    return Blocks(corpus, ByteTokenizer(), **options)


def _lines(folder: Path, count: int) -> list[Path]:
    """Two files of numbered lines, each line 16 bytes with its line feed."""
    files = [folder / "a.txt", folder / "b.txt"]
    for i, file in enumerate(files):
        file.write_text("".join(f"line {i} {n:07d}\n" for n in range(count)))
    return files


def test_every_sample_is_in_one_block_or_held_out_and_in_no_two(tmp_path: Path) -> None:
    made = _blocks(TextFiles(_lines(tmp_path, 400)))
    seen = [tuple(s.tolist()) for b in range(made.blocks) for s in made.block(b, 0)]
    held_out = [tuple(s.tolist()) for s in made.validation()]
    assert len(seen) == len(set(seen))
    assert not set(seen) & set(held_out)
    assert len(held_out) == 8
    assert 600 <= len(seen) <= 792
    assert all(sample.shape == (16,) for sample in made.block(0, 0))


def test_a_block_is_the_same_everywhere_and_in_another_order_in_another_epoch(
    tmp_path: Path,
) -> None:
    files = _lines(tmp_path, 400)
    one, other = _blocks(TextFiles(files)), _blocks(TextFiles(files))
    first = torch.stack(one.block(3, 0))
    assert torch.equal(first, torch.stack(other.block(3, 0)))
    again = torch.stack(one.block(3, 1))
    assert sorted(map(tuple, again.tolist())) == sorted(map(tuple, first.tolist()))
    assert torch.equal(torch.stack(one.validation()), torch.stack(other.validation()))


def test_cuts_never_split_or_repeat_a_letter(tmp_path: Path) -> None:
    text = "aé漢😀" * 500
    file = tmp_path / "a.txt"
    file.write_text(text, "utf-8")
    corpus = TextFiles([file])
    for width in (1, 2, 3, 7, 64):
        parts = [
            part
            for start in range(0, corpus.length, width)
            for part in corpus.documents(start, min(start + width, corpus.length))
        ]
        assert "".join(parts) == text, width


def test_every_record_is_in_exactly_one_range(tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for i, file in enumerate(files):
        rows = [{"q": f"{i}-{n}", "a": "é" * (n % 40)} for n in range(100)]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        file.write_text(text + "\n" * (1 - i), "utf-8")  # the second lacks the last line feed
    corpus = JsonLines(files, ["q", "a"])
    for width in (1, 17, 100, 10**6):
        found = [
            text
            for start in range(0, corpus.length, width)
            for text in corpus.documents(start, min(start + width, corpus.length))
        ]
        assert [text.split("\n")[0] for text in found] == [
            f"{i}-{n}" for i in range(2) for n in range(100)
        ], width


def test_one_bad_record_is_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\nnot json\n{"other": 1}\n{"text": "fine"}\n')
    corpus = JsonLines([file], ["text"])
    assert corpus.documents(0, corpus.length) == ["good", "fine"]
    assert corpus.skipped == 2


def test_parquet_rows_are_read_across_row_groups_and_files(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from peer.train.data import parquet_rows

    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for i, file in enumerate(files):
        table = pyarrow.table({"text": [f"{i}-{n} " * 5 for n in range(50)], "n": range(50)})
        pyarrow.parquet.write_table(table, file, row_group_size=7)
    rows = parquet_rows(files, ["text"])
    assert rows.length == 100
    found = [t for start in range(0, 100, 9) for t in rows.documents(start, min(start + 9, 100))]
    assert [t.split()[0] for t in found] == [f"{i}-{n}" for i in range(2) for n in range(50)]
    with pytest.raises(DataError, match=r"no column 'words'.*text, n"):
        parquet_rows(files, ["words"])
    files[1].write_text("not parquet at all")
    with pytest.raises(DataError, match=r"b\.parquet: not Parquet"):
        parquet_rows(files, ["text"])
    own = replace(manifest(), data=DataSpec(source="parquet", sequence_length=16, block_samples=4))
    assert build_data(own, None, ByteTokenizer(), [files[0]]).blocks > 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\x80\x81" * 100, "not UTF-8"),
        (b"a\x00b" * 100, "zero bytes"),
        (b" \n" * 100, "blanks"),
        (b"short", "too little text"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(content)
    own = replace(manifest(), data=DataSpec(source="text", sequence_length=16))
    with pytest.raises(DataError, match=rf"mine\.txt.*{words}"):
        build_data(own, None, ByteTokenizer(), [file])


def test_data_that_is_left_to_each_peer_is_asked_for(tmp_path: Path) -> None:
    own = replace(manifest(), data=DataSpec(source="jsonl", sequence_length=16))
    with pytest.raises(DataError, match="--data"):
        build_data(own, None, ByteTokenizer())
    with pytest.raises(DataError, match="nowhere"):
        build_data(own, None, ByteTokenizer(), [tmp_path / "nowhere"])
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "x"}\n')
    with pytest.raises(DataError, match=r"lacks text \(it has question\)"):
        build_data(own, None, ByteTokenizer(), [file])


def test_the_hub_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"murmuration\[hub\]"):
        hub_rows("owner/name", "", "train", ["text"])


def test_a_hub_data_set_is_read_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table:
        column_names = ("text", "other")

        def __len__(self) -> int:
            return 30

        def __getitem__(self, rows: slice) -> dict[str, list[str]]:
            return {"text": [f"row {i}" for i in range(30)[rows]], "other": []}

    module = types.ModuleType("datasets")
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Table:
        asked.append((args, kwargs))
        return Table()

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    rows = hub_rows("owner/name", "", "train", ["text"])
    assert asked == [(("owner/name", None), {"split": "train"})]
    assert rows.documents(28, 30) == ["row 28", "row 29"]
    with pytest.raises(DataError, match="no field 'words'"):
        hub_rows("owner/name", "", "train", ["words"])


def test_the_built_in_text_opens_fast_and_holds_out_whole_files() -> None:
    started = time.perf_counter()
    train, held_out = stdlib_files()
    data = build_data(manifest(), None, ByteTokenizer())
    assert time.perf_counter() - started < 1.0
    assert not set(train) & set(held_out)
    assert sum(file.stat().st_size for file in train) > 2 * 2**20
    assert data.blocks > 100
    assert len(data.validation()) == manifest().data.validation_samples
