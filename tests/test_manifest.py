"""A manifest is data: the same bytes everywhere, and every error names its field."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from peer.errors import DataError, ManifestError, VersionError
from peer.manifest import Manifest, ModelSpec, default_manifest
from peer.manifest_templates import (
    HYBRID_TEMPLATE,
    LORA_TEMPLATE,
    TEMPLATE,
    ZO_TEMPLATE,
)
from peer.manifest_toml import DATA_ASSET_BYTES_MAX, read_toml, stage_assets
from protocols import limits

HERE = Path()


def test_canonical_bytes_give_the_same_manifest_and_the_same_bytes() -> None:
    made = default_manifest()
    again = Manifest.from_canonical(made.to_canonical())
    assert again == made
    assert again.to_canonical() == made.to_canonical()
    assert again.run_id() == made.run_id()
    assert len(made.run_id()) == 64


@pytest.mark.parametrize(
    "text",
    [TEMPLATE, LORA_TEMPLATE, HYBRID_TEMPLATE, ZO_TEMPLATE],
    ids=["pretrain", "lora", "hybrid", "zo"],
)
def test_the_templates_are_valid_as_they_are(text: str) -> None:
    made = Manifest.from_toml(text, HERE)
    assert Manifest.from_canonical(made.to_canonical()) == made


def test_the_template_shows_the_values_of_the_default_run() -> None:
    made = Manifest.from_toml(TEMPLATE, HERE)
    default = default_manifest()
    for section in ("data", "method", "inner", "outer", "schedule", "codec", "group"):
        assert getattr(made, section) == getattr(default, section), section


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("lr = 2e-3", "lr = -1", "inner.lr: must be > 0 (got -1)"),
        ("lr = 2e-3", "lr = nan", "inner.lr: must be finite"),
        ("lr = 2e-3", 'lr = "high"', "inner.lr: must be a number"),
        ("batch_size = 8", "batch_size = 8.5", "inner.batch_size: must be a whole number"),
        ("betas = [0.9, 0.95]", "betas = [0.9]", "inner.betas: must be two numbers"),
        ("warmup_steps", "warmup_step", "did you mean inner.warmup_steps?"),
        ("[outer]", "[outr]", "outr: unknown key; did you mean outer?"),
        ('kind = "pretrain"', 'kind = "x"', "method.kind: must be pretrain, lora, hybrid or zo"),
        ('name = "q4"', 'name = "q5"', "codec.name: must be one of"),
        ('"llama"', '"evil"', "model.config.model_type: must be llama"),
        ("hidden_size = 256", "hidden_sise = 256", "did you mean model.config.hidden_size?"),
        ("vocab_size = 320", "vocab_size = 200", "model.config.vocab_size: must be at least 257"),
        ("vocab_size = 320", "vocab_size = 99999999", "model.config.vocab_size: must be 1 to"),
        ("seed = 0 ", "seed = -1 ", "model.seed: must be"),
        ("sequence_length = 128", "sequence_length = 2048", "at most the model's 1024 positions"),
        ('name = "my run"', 'name = ""', "name: must be"),
        ("quorum = 0.5", "quorum = 0.0", "group.quorum: must be > 0"),
        ("members_max = 8", "members_max = 99", "group.members_max: must be 2 to 16"),
        ('source = "stdlib"', 'source = "hf"', "data.dataset: must be OWNER/NAME"),
        ("round_s = 5.0", "round_s = 0.0", "schedule.round_s: must be"),
        ("[data]", "[[data]]", "data: must be a table"),
    ],
)
def test_a_wrong_field_is_named(old: str, new: str, words: str) -> None:
    assert old in TEMPLATE
    with pytest.raises(ManifestError) as caught:
        Manifest.from_toml(TEMPLATE.replace(old, new, 1), HERE)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "extra", ["auto_map", "attn_implementation", "quantization_config", "_name_or_path"]
)
def test_a_config_cannot_name_code_or_places(extra: str) -> None:
    config = {**default_manifest().model.config, extra: "somebody/else"}
    with pytest.raises(ManifestError, match="unknown key"):
        ModelSpec(config=config)


def test_a_run_for_a_newer_program_says_so_before_anything_else() -> None:
    raw = json.loads(default_manifest().to_canonical())
    raw["min_version"] = limits.PROTOCOL_VERSION + 1
    raw["a_field_of_the_future"] = 1
    with pytest.raises(VersionError, match="update"):
        Manifest.from_canonical(_bytes(raw))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b'"name"',
        b"\xff\xfe",
        b"{" * 3000,
        b"[" * 60000,
        b'{"name":"x"}',
        b'{"name":NaN}',
        b'{"name":' + b"9" * 5000 + b"}",
        b"x" * (limits.MANIFEST_BYTES_MAX + 1),
    ],
)
def test_garbage_from_a_stranger_is_a_manifest_error(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_canonical(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("inner", "lr"), 1),  # an int where a float belongs is another text, so another id
        (("inner", "lr"), True),
        (("inner", "batch_size"), 8.0),
        (("name",), "a\ud800"),
        (("name",), "a\nb"),
        (("data", "paths"), ["/etc/passwd"]),
        (("data", "paths"), ["data/../../x"]),
        (("data", "paths"), ["data/absent"]),
        (("model", "config"), []),
        (("model", "config", "rope_parameters"), {"a": {"b": {"c": {"d": {}}}}}),
        (("model", "config", "layer_types"), ["x"] * 5000),
        (("model", "config", "initializer_range"), 1e300),
        (("model", "config", "hidden_size"), 2**40),
        (("assets",), [{"name": "model/../x", "sha256": "0" * 64, "bytes": 1}]),
        (("assets",), [{"name": "model/x", "sha256": "0", "bytes": 1}]),
        (("assets",), [{"name": "model/x", "sha256": "0" * 64, "bytes": 2**60}]),
        (("assets",), [{"name": "model/x", "sha256": "0" * 64, "bytes": 1}] * 2),
        (("method", "targets"), [".*(a+)+$"]),
        (("min_version",), 0),
    ],
)
def test_a_hostile_field_is_refused(path: tuple[str, ...], value: Any) -> None:
    raw = json.loads(default_manifest().to_canonical())
    section = raw
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with pytest.raises(ManifestError):
        Manifest.from_canonical(_bytes(raw))


def test_only_the_canonical_form_is_accepted() -> None:
    raw = json.loads(default_manifest().to_canonical())
    spaced = json.dumps(raw, sort_keys=True).encode()
    unsorted = json.dumps(dict(reversed(raw.items())), separators=(",", ":")).encode()
    canonical = default_manifest().to_canonical()
    twice = canonical.replace(b'"name":"first light"', b'"name":"x","name":"first light"')
    for data in (spaced, unsorted, twice, canonical + b" "):
        assert data != canonical
        with pytest.raises(ManifestError, match="canonical"):
            Manifest.from_canonical(data)


def test_damaged_bytes_never_raise_anything_else() -> None:
    canonical = default_manifest().to_canonical()
    for seed in range(2000):
        rng = random.Random(seed)
        data = bytearray(canonical)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            again = Manifest.from_canonical(bytes(data))
        except (ManifestError, VersionError):
            continue
        assert again.to_canonical() == bytes(data), f"seed {seed}"


def test_small_data_becomes_assets_in_order_and_no_path_stays(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "b.txt").write_text("second " * 50)
    (folder / "a.txt").write_text("first " * 50)
    (tmp_path / "c.txt").write_text("third " * 50)
    text = 'name = "x"\n' + _model() + '[data]\nsource="text"\npaths=["books","c.txt"]\n'
    draft = read_toml(text, tmp_path)
    assert draft.manifest.data.paths == ("data/000", "data/001", "data/002")
    assert [file.name for file in draft.data] == ["a.txt", "b.txt", "c.txt"]
    assert str(tmp_path).encode() not in draft.manifest.to_canonical()
    stage_assets(draft.files, tmp_path / "assets")
    assert (tmp_path / "assets/data/002").read_text().startswith("third")
    assert Manifest.from_canonical(draft.manifest.to_canonical()) == draft.manifest


def test_large_data_is_left_to_each_peer(tmp_path: Path) -> None:
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(DATA_ASSET_BYTES_MAX + 1)
    text = 'name = "x"\n' + _model() + '[data]\nsource="text"\npaths=["large.txt"]\n'
    draft = read_toml(text, tmp_path)
    assert draft.manifest.data.paths == ()
    assert draft.manifest.assets == ()
    assert draft.data == (tmp_path / "large.txt",)


def test_missing_and_empty_data_files_are_named(tmp_path: Path) -> None:
    text = 'name = "x"\n' + _model() + '[data]\nsource="text"\npaths=["gone.txt"]\n'
    with pytest.raises(DataError, match=r"gone\.txt"):
        read_toml(text, tmp_path)
    (tmp_path / "gone.txt").touch()
    with pytest.raises(DataError, match=r"gone\.txt: the file is empty"):
        read_toml(text, tmp_path)


def test_a_model_folder_that_needs_its_own_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {}}')
    with pytest.raises(ManifestError, match="own code"):
        read_toml('name = "x"\n[model]\nfolder = "."\n', tmp_path)


def _bytes(raw: Any) -> bytes:
    text = json.dumps(raw, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def _model() -> str:
    return '[model.config]\nmodel_type = "llama"\nvocab_size = 320\n'


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            '"dense", "lowrank"',
            '"lowrank", "dense"',
            "method.admit: must be some of dense, lowrank",
        ),
        ('"dense", "lowrank"', '"dense", "gossip"', "method.admit: must be some of"),
        ('["dense", "lowrank", "seeds", "sparse"]', "[]", "method.admit: must be some of"),
        ("effective_dim = 100.0", "effective_dim = -1.0", "method.effective_dim: must be 0 to"),
        ("seeds_lr = 0.01", "seeds_lr = 0.0", "method.seeds_lr: must be > 0"),
        ("spectrum = 1.0", "spectrum = 1.5", "method.spectrum: must be 0 to 1"),
        ("\nstep = 1.0", "\nstep = 0.0", "method.step: must be > 0"),
        ("seeds_lr = 0.01", 'aggregate = "fedit"', "method.aggregate: must be exact for hybrid"),
        ("fragments = 1 ", "fragments = 2 ", "schedule.fragments: must be 1 for hybrid"),
        ("gossip_every = 0", "gossip_every = 4", "schedule.gossip_every: must be 0 for hybrid"),
        ("[codec]", "[outer]\ntau = 2\n[codec]", "outer.tau: must be 0 for hybrid"),
        ("[codec]", "[outer]\nalpha = 0.5\n[codec]", "outer.alpha: must be 0 for hybrid"),
    ],
)
def test_what_a_hybrid_run_cannot_do_is_named(old: str, new: str, words: str) -> None:
    assert Manifest.from_toml(HYBRID_TEMPLATE, HERE).method.kind == "hybrid"
    assert old in HYBRID_TEMPLATE
    with pytest.raises(ManifestError) as caught:
        Manifest.from_toml(HYBRID_TEMPLATE.replace(old, new, 1), HERE)
    assert words in str(caught.value)
