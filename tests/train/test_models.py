"""Every allowed architecture builds, trains, speaks and comes back from its own files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peer.errors import ManifestError, StorageError
from peer.manifest import MODEL_TYPES, Manifest, ModelSpec
from peer.manifest_toml import read_toml, stage_assets
from peer.train import build_data, build_method, build_tokenizer
from peer.train.models import load_folder, parameters_of
from peer.train.sample import sample
from peer.train.stream import BlockStream
from peer.train.tokens import ByteTokenizer
from tests.train.tiny import CONFIG, batch, built, everywhere, manifest, method, reduce


def _config(kind: str) -> dict[str, Any]:
    ends = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    if kind == "gpt2":
        return {"model_type": kind, "vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 2,
                "n_positions": 64, **ends}  # fmt: skip
    config = {**CONFIG, **ends, "model_type": kind, "intermediate_size": 48}
    if kind in ("gpt_neox", "phi"):
        config["num_key_value_heads"] = 2
    return config


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_every_allowed_architecture_trains(kind: str) -> None:
    made = replace(manifest(), model=ModelSpec(config=_config(kind)))
    trained = build_method(made, device="cpu", threads=1)
    assert build_method(made, device="cpu").digest() == trained.digest()
    assert trained.parameters == parameters_of(made.model.config)
    first = trained.step(batch(0)).loss
    for _ in range(5):
        last = trained.step(batch(0)).loss
    assert last < first


def test_a_saved_model_becomes_a_run_and_its_weights_are_the_start(tmp_path: Path) -> None:
    made = method()
    made.step(batch(1))
    made.apply(reduce(made, [made.contribution()]), everywhere(made, True))
    made.export(str(tmp_path / "saved"))
    ByteTokenizer().save(tmp_path / "saved")
    text = 'name="x"\n[model]\nfolder="saved"\n[data]\nsequence_length=16\n'
    draft = read_toml(text, tmp_path)
    assert draft.manifest.asset_names("model") == ["model/model.safetensors"]
    assert draft.manifest.model.tokenizer == "file"
    again = Manifest.from_canonical(draft.manifest.to_canonical())
    stage_assets(draft.files, tmp_path / "assets")
    started = build_method(again, tmp_path / "assets", device="cpu")
    ids = batch(7)
    with torch.no_grad(), made.outer_model() as one, started.outer_model() as other:
        assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)
    assert build_tokenizer(again, tmp_path / "assets").size == 257
    with pytest.raises(StorageError, match=r"model/model\.safetensors"):
        build_method(again, tmp_path / "elsewhere", device="cpu")
    (tmp_path / "assets/model/model.safetensors").unlink()
    (tmp_path / "assets/model/model.safetensors").write_bytes(b"garbage" * 100)
    with pytest.raises(ManifestError, match="model"):
        build_method(again, tmp_path / "assets", device="cpu")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    made = method()
    made.export(str(tmp_path / "saved"))
    text = 'name="x"\n[model]\nfolder="saved"\n[data]\nsequence_length=16\n'
    other = read_toml(text, tmp_path)
    stage_assets(other.files, tmp_path / "assets")
    other.manifest.model.config["num_hidden_layers"] = 3
    with pytest.raises(ManifestError, match="lack"):
        build_method(other.manifest, tmp_path / "assets", device="cpu")


def test_the_same_seed_says_the_same_and_none_is_no_model(tmp_path: Path) -> None:
    made = method()
    with made.outer_model() as model:
        one = sample(model, ByteTokenizer(), "def ", 20, 1.0, seed=1)
        assert one == sample(model, ByteTokenizer(), "def ", 20, 1.0, seed=1)
        assert one != sample(model, ByteTokenizer(), "def ", 20, 1.0, seed=2)
        assert len(sample(model, ByteTokenizer(), "x" * 500, 200, 0).encode()) <= 600
        with pytest.raises(ValueError, match="tokens"):
            sample(model, ByteTokenizer(), "x", 0)
    made.export(str(tmp_path / "out"))
    loaded = load_folder(tmp_path / "out")
    assert sample(loaded, ByteTokenizer(), "def ", 20, 1.0, seed=1) == one
    with pytest.raises(StorageError, match="no model there"):
        load_folder(tmp_path / "nothing")


def test_greedy_sampling_is_what_the_whole_text_would_give() -> None:
    made = method()
    for i in range(5):
        made.inner.step(batch(i))
    tokenizer = ByteTokenizer()
    text = "abc"
    model = made.inner.model.eval()
    for _ in range(8):
        ids = torch.tensor([[256, *tokenizer.encode(text)]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        text += tokenizer.decode([int(logits[0, -1, :257].argmax())])
    assert sample(model, tokenizer, "abc", 8, 0) == text[3:]


def test_the_loss_falls_on_the_built_in_text() -> None:
    made = manifest()
    trained = built(made)
    data = build_data(made, None, ByteTokenizer())
    stream = BlockStream(data, batch_size=4, seed=0, peer="a")
    held = [torch.stack(data.validation()[i : i + 16]) for i in range(0, 64, 16)]
    start = trained.evaluate(held)
    for _ in range(4):
        for _ in range(25):
            trained.step(stream.next_batch())
        trained.apply(reduce(trained, [trained.contribution()]), everywhere(trained, True))
    assert trained.evaluate(held) < start - 1.5
