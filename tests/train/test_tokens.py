"""Bytes in, the same bytes out; and a tokenizer.json that anybody's tools read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from peer.errors import ManifestError
from peer.manifest_toml import stage_assets
from peer.train import build_tokenizer
from peer.train.tokens import ByteTokenizer, FileTokenizer
from tests.train.tiny import manifest

TEXT = "def f(x):\n\treturn 'naïve 漢字 😀'  # \x00\x7f\n\n"


def test_bytes_round_trip() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode([256, 65, 300, 0xE6, 66]) == "A\ufffdB"


def test_the_saved_byte_tokenizer_gives_the_same_ids_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ByteTokenizer().save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded(TEXT, add_special_tokens=False)["input_ids"] == list(TEXT.encode())
    assert loaded.decode(list(TEXT.encode())) == TEXT
    assert loaded.eos_token_id == 256


def test_a_tokenizer_file_is_read_with_its_end_mark(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.end == 256
    assert tokenizer.size == 257
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    tokenizer.encode("\ud800")
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer.save(copy)
    assert FileTokenizer(copy / "tokenizer.json").end == 256


def test_a_tokenizer_that_the_model_cannot_hold_is_refused(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    files = {"tokenizer/tokenizer.json": tmp_path / "tokenizer.json"}
    stage_assets(files, tmp_path / "assets")
    made = manifest()
    model = replace(made.model)
    object.__setattr__(model, "tokenizer", "file")
    object.__setattr__(made, "model", model)
    assert build_tokenizer(made, tmp_path / "assets").size == 257
    model.config["vocab_size"] = 100
    with pytest.raises(ManifestError, match="257 ids and the model only 100"):
        build_tokenizer(made, tmp_path / "assets")


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"tokenizer\.json can't be read"):
        FileTokenizer(tmp_path / "tokenizer.json")
