"""`run new`, `run check`, and what a wrong manifest or wrong data gets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peer.manifest import Manifest
from tests.cli.conftest import Cli
from tests.cli.manifests import TINY, write
from tests.train.chat_tiny import lines, sums


@pytest.mark.parametrize("kind", ["pretrain", "lora", "hybrid", "zo"])
def test_a_new_manifest_is_good_as_it_is(cli: Cli, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "mine.toml"
    said = cli("run", "new", file, "--method", kind)
    assert said.code == 0
    assert f"run check {file}" in said.out
    manifest = Manifest.from_toml(file.read_text(), tmp_path)
    assert manifest.method.kind == kind
    again = cli("run", "new", file)
    assert (again.code, again.out) == (2, "")
    assert "is there already" in again.err
    assert Manifest.from_toml(file.read_text(), tmp_path) == manifest


def test_check_says_what_would_start(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path)
    said = cli("run", "check", file)
    assert said.code == 0, said.err
    manifest = Manifest.from_toml(file.read_text(), tmp_path)
    assert manifest.run_id() in said.out
    # Embedding and head; q, k, v, o; gate, up, down; three norms.
    parameters = 2 * 257 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16
    assert f"{parameters / 1000:.3g} k parameters" in said.out
    assert re.search(
        r"text \(1 file\): \d+ blocks to share out; \d+ samples of 32 tokens held out", said.out
    )
    assert "1 (" in said.out, "the file that joiners fetch"


@pytest.mark.parametrize(
    ("old", "new", "code", "text"),
    [
        ("hidden_size = 16", "hidden_size = -1", 3, "model.config.hidden_size"),
        ('"llama"', '"evil"', 3, "model.config.model_type: must be llama"),
        ("[inner]", '[inner]\nlrr = 1', 3, "inner.lrr"),
        ("round_s = 0.5", 'round_s = "soon"', 3, "schedule.round_s"),
        ("vocab_size = 257", "vocab_size = 257\nauto_map = {}", 3, "model.config.auto_map"),
        ("num_attention_heads = 2", "num_attention_heads = 3", 3, "model.config"),
        ('name = "tiny"', "name =", 3, "not TOML"),
        ('name = "tiny"', 'name = "tiny"\nmin_version = 99', 8, "version"),
        ('"text.txt"', '"missing.txt"', 4, "missing.txt"),
        ("sequence_length = 32", "sequence_length = 128\n", 0, ""),
        ("sequence_length = 32", "sequence_length = 129\n", 3, "data.sequence_length"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(
    cli: Cli, tmp_path: Path, old: str, new: str, code: int, text: str
) -> None:
    assert old in TINY
    said = cli("run", "check", write(tmp_path, TINY.replace(old, new)))
    assert said.code == code, said.err
    assert text in said.err
    assert said.err.count("\n") == (code != 0)


@pytest.mark.parametrize("command", ["check", "start"])
@pytest.mark.parametrize(
    ("content", "text"),
    [(b"", "empty"), (b"\x7fELF\x00\x00\xff\xfe" * 4000, "text"), (b"short", "too little text")],
)
def test_data_that_cannot_be_trained_on_is_refused(
    cli: Cli, tmp_path: Path, command: str, content: bytes, text: str
) -> None:
    more = ["--host", "127.0.0.1", "--log-json"] if command == "start" else []
    said = cli("run", command, write(tmp_path, text=content), *more)
    assert said.code == 4, said.err
    assert str(tmp_path / "text.txt") in said.err
    assert text in said.err
    assert said.err.count("\n") == 1


def test_what_is_no_manifest_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    assert cli("run", "check", tmp_path / "picture.png").code == 3
    (tmp_path / "huge.toml").write_bytes(b"#" * 2**21)
    assert cli("run", "check", tmp_path / "huge.toml").code == 3
    missing = cli("run", "start", tmp_path / "missing.toml")
    assert missing.code == 2
    assert "run new" in missing.err
    assert cli("run", "check", tmp_path).code == 2
    assert cli("run", "new", tmp_path / "no" / "folder.toml").code == 2


CHAT = TINY.replace('source = "text"\npaths = ["text.txt"]', 'source = "chat"\npaths = ["q.jsonl"]')


def test_check_tells_of_rows_that_are_left_out(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path, CHAT.replace("sequence_length = 32", "sequence_length = 64"))
    lines(tmp_path / "q.jsonl", [*sums(30), *["{}"] * 8])
    said = cli("run", "check", file)
    assert said.code == 0, said.err
    assert re.search(r"chat \(1 file\): \d+ blocks to share out; 1 samples of 64", said.out)
    assert f"        left out: {tmp_path}/q.jsonl:31: has nothing; it needs" in said.out
    assert "        left out: 8 rows in all\n" in said.out
    lines(tmp_path / "q.jsonl", ["{}"])
    said = cli("run", "check", file)
    assert said.code == 4
    assert "q.jsonl: none of its 1 rows can be used" in said.err


def test_a_run_whose_peers_bring_their_own_says_how_to_start_it(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "tune.toml"
    assert f"start {file} --data FILES" in cli("run", "new", file, "--method", "lora").out
    said = cli("run", "check", file)
    assert said.code == 0, said.err
    assert "chat: each peer brings its own (--data)" in said.out
    assert f"start {file} --data FILES" in said.out
    assert "--data" not in cli("run", "new", tmp_path / "all.toml").out
