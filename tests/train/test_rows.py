"""Rows by file and line; bad ones are named, and nothing else is affected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peer.errors import DataError
from peer.train import rows as rows_module
from peer.train.conversation import Example, RowError
from peer.train.rows import ChatRows
from tests.train.chat_tiny import lines, sums


def _texts(rows: ChatRows) -> list[str]:
    return [example.turns[0].text for example in rows.read(range(len(rows)))]


def test_rows_of_several_files_and_both_kinds_come_in_order(tmp_path: Path) -> None:
    one = lines(tmp_path / "a.jsonl", sums(3))
    other = tmp_path / "b.json"
    # Letters of several bytes: places are bytes, and the list is one line.
    listed = [{"question": f'ä漢😀 {n} "[]{{}},', "answer": "é\n"} for n in range(4)]
    other.write_text("\ufeff [" + ",\n ".join(json.dumps(r, ensure_ascii=False) for r in listed)
                     + "] \n", "utf-8")  # fmt: skip
    third = lines(tmp_path / "c.jsonl", ["", "\ufeff" + json.dumps(sums(1, 9)[0]), "", ""])
    rows = ChatRows([one, other, third])
    assert _texts(rows) == [
        *(r["question"] for r in sums(3)), *(r["question"] for r in listed),
        sums(1, 9)[0]["question"],
    ]  # fmt: skip
    assert rows.name(1) == f"{one}:2"
    assert rows.name(4) == f"{other}[2]"
    assert rows.name(7) == f"{third}:2"
    assert [e.turns[0].text for e in rows.read([7, 0, 4])] == [
        sums(1, 9)[0]["question"], sums(1)[0]["question"], listed[1]["question"],
    ]  # fmt: skip


def test_a_bad_row_is_named_and_the_others_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, other = sums(2)
    file = lines(tmp_path / "a.jsonl", [
        good, '{"question": "no end', {"question": "unanswered"}, other, "\xff\xfe",
    ])  # fmt: skip
    rows = ChatRows([file])
    assert _texts(rows) == [good["question"], other["question"]]
    assert rows.refused_count == 3
    assert [name.partition(": ")[0] for name in rows.refused] == [
        f"{file}:2", f"{file}:3", f"{file}:5",
    ]  # fmt: skip
    assert rows.refused[1] == f"{file}:3: has no answer: answer is missing"
    assert len(caplog.records) == 1, "the first is said, the rest counted"
    assert f"{file}:2: is not JSON" in caplog.text


def test_names_are_kept_of_so_many_only(tmp_path: Path) -> None:
    rows = ChatRows([lines(tmp_path / "a.jsonl", [*sums(1), *["{}"] * 250])])
    assert (len(rows), rows.refused_count, len(rows.refused)) == (1, 250, 100)


def test_a_reason_of_the_tokenizers_is_one_too(tmp_path: Path) -> None:
    def check(example: Example) -> None:
        if "1:" in example.turns[0].text:
            raise RowError("odd")

    file = lines(tmp_path / "a.jsonl", sums(3))
    rows = ChatRows([file], check)
    assert len(rows) == 2
    assert rows.refused == [f"{file}:2: odd"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (
            b'{"text": "x"}\n{"text": "y"}\n',
            r"none of its 2 rows can be used; .*a\.json:1: has text",
        ),
        (b"[]", "the file is empty"),
        (b'[{"question": "x"}]', r"none of its 1 rows.*a\.json\[1\]: has no answer"),
        (b'[{"question": "x", "answer": "y"}', "no comma or ]"),
        (b'[{"question": "x", "answer": "y"},', "no end"),
        (b'[{"question": "x", "answer": "y"}; 2]', r"a\.json\[1\]: no comma or \]"),
        (b'[{"question": ]', r"a\.json\[1\]: is not JSON"),
        (b"[" * 100_000, r"a\.json\[1\]: is not JSON"),
    ],
)
def test_a_file_without_a_row_is_said(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        ChatRows([file])


def test_limits_and_missing_files_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="nowhere"):
        ChatRows([tmp_path / "nowhere.jsonl"])
    file = lines(tmp_path / "a.jsonl", sums(5))
    monkeypatch.setattr(rows_module, "ROWS_MAX", 4)
    with pytest.raises(DataError, match="more than 4 rows"):
        ChatRows([file])
    monkeypatch.setattr(rows_module, "LIST_BYTES_MAX", 4)
    file.write_text(json.dumps(sums(5)))
    with pytest.raises(DataError, match="one record a line"):
        ChatRows([file])


def test_a_line_without_an_end_is_cut_to_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "ROW_BYTES_MAX", 64)
    file = lines(tmp_path / "a.jsonl", [{"question": "x" * 200, "answer": "y"}, *sums(1)])
    assert _texts(ChatRows([file])) == [sums(1)[0]["question"]]


def test_a_file_that_changes_under_way_is_said(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", sums(3))
    rows = ChatRows([file])
    lines(file, ["{}"] * 30)
    with pytest.raises(DataError, match=r"a\.jsonl:1: has changed"):
        rows.read([0])
    file.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl:1: has changed"):
        rows.read([0])
