"""A run over conversations, from its owner's TOML to a joiner's samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peer.errors import DataError, ManifestError
from peer.manifest import DataSpec, Manifest
from peer.manifest_templates import LORA_TEMPLATE
from peer.manifest_toml import read_toml, stage_assets
from peer.train import build_data, build_method, build_tokenizer
from peer.train.chat import ChatBlocks
from peer.train.inner import save_model
from peer.train.models import seeded_model
from peer.train.tokens import ByteTokenizer
from tests.train.chat_tiny import CHATML, lines, sums, tokenizer
from tests.train.tiny import CONFIG

TOML = """
name = "legs"
[model]
folder = "model"
[data]
source = "chat"
paths = ["rows"]
sequence_length = 48
block_samples = 4
[method]
kind = "lora"
rank = 2
[schedule]
gossip_every = 0
"""


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    """The folder of a run's owner: a model with a chat template, and two files of rows."""
    save_model(seeded_model({**CONFIG, "vocab_size": 404}, 0), tmp_path / "model")
    tokenizer(tmp_path / "model", CHATML)
    (tmp_path / "rows").mkdir()
    lines(tmp_path / "rows/a.jsonl", sums(40))
    (tmp_path / "rows/b.json").write_text(json.dumps(sums(40, 40)))
    (tmp_path / "rows/notes.txt").write_text("no rows")
    return tmp_path


def test_a_joiner_reads_what_the_owner_meant_and_runs_no_template(
    owner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = read_toml(TOML, owner)
    names = [asset.name for asset in draft.manifest.assets]
    assert names == [
        "data/000", "data/001", "model/model.safetensors", "tokenizer/chat_format.json",
        "tokenizer/chat_template.jinja", "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]  # fmt: skip
    manifest = Manifest.from_canonical(draft.manifest.to_canonical())
    assert manifest.run_id() == read_toml(TOML, owner).manifest.run_id()
    assets = owner / "joiner"
    stage_assets(draft.files, assets)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a joiner ran a template")

    monkeypatch.setattr("peer.train.template._render", never)
    made = build_tokenizer(manifest, assets)
    data = build_data(manifest, assets, made)
    assert isinstance(data, ChatBlocks)
    assert len(data.rows) == 80
    (mine, other) = (data.block(1, 0), build_data(manifest, assets, made).block(1, 0))
    assert torch.equal(torch.stack(mine), torch.stack(other))
    text = "".join(made.decode([i]) or "|" for i in mine[0][0].tolist())
    assert text.startswith("|user\n")
    method = build_method(manifest, assets, "cpu", 1)
    assert method.step(torch.stack(mine)).tokens > 0
    saved = owner / "saved"
    saved.mkdir()
    made.save(saved)
    assert (saved / "chat_format.json").is_file()
    assert (saved / "chat_template.jinja").read_text() == CHATML


def test_a_run_of_plain_text_is_sent_no_format(owner: Path) -> None:
    (owner / "rows/notes.txt").write_text("plain text " * 100)
    text = TOML.replace('"chat"', '"text"').replace('["rows"]', '["rows/notes.txt"]')
    names = [asset.name for asset in read_toml(text, owner).manifest.assets]
    assert "tokenizer/chat_format.json" not in names


def test_a_template_that_does_more_is_the_owners_to_mend(owner: Path) -> None:
    (owner / "model/chat_template.jinja").write_text("{{ messages | length }}")
    with pytest.raises(ManifestError, match=r"model\.tokenizer: the chat template beside"):
        read_toml(TOML, owner)


def test_a_damaged_format_is_said(owner: Path) -> None:
    draft = read_toml(TOML, owner)
    stage_assets({**draft.files, "tokenizer/chat_format.json": b"{}"}, owner / "joiner")
    made = build_tokenizer(draft.manifest, owner / "joiner")
    with pytest.raises(ManifestError, match="is no chat format"):
        build_data(draft.manifest, owner / "joiner", made)


def test_each_peer_may_bring_its_own_folder(tmp_path: Path) -> None:
    manifest = read_toml(LORA_TEMPLATE, tmp_path).manifest
    assert (manifest.data.source, manifest.data.paths) == ("chat", ())
    with pytest.raises(DataError, match="--data"):
        build_data(manifest, None, ByteTokenizer())
    mine = tmp_path / "mine"
    mine.mkdir()
    lines(mine / "a.jsonl", sums(30))
    data = build_data(manifest, None, ByteTokenizer(), [mine])
    assert data.blocks >= 1
    assert len(data.validation()) == 1


def test_fields_make_no_sense_for_conversations() -> None:
    with pytest.raises(ManifestError, match=r"data\.fields: must be left out for chat"):
        DataSpec(source="chat", fields=("question", "answer"))
