"""`export` and `sample`: from the newest valid checkpoint, or a clear word why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.checkpoint import CheckpointStore
from peer.finding import save_manifest
from peer.home import open_seat
from peer.manifest import Manifest
from peer.manifest_toml import read_toml, stage_assets
from peer.train import build_method
from tests.cli.conftest import Cli
from tests.cli.manifests import write


@pytest.fixture
def trained(tmp_path: Path) -> Manifest:
    """A home whose seat-1 has checkpoints of rounds 4 and 6 of a run."""
    draft = read_toml(write(tmp_path).read_text(), tmp_path)
    run = draft.manifest.run_id()
    with open_seat(tmp_path / "home") as seat:
        folder = seat.run_folder(run)
        save_manifest(folder, draft.manifest)
        stage_assets(draft.files, folder / "assets")
        store = CheckpointStore(folder / "checkpoints")
        method = build_method(draft.manifest, folder / "assets", "cpu", 1)
        for number in (4, 6):
            store.save(number, method.state(), {}, {})
        seat.remember(run=run)
    return draft.manifest


def checkpoints(home: Path) -> list[Path]:
    return sorted(home.glob("seat-1/runs/*/checkpoints/checkpoint-*"))


@pytest.mark.parametrize("command", ["sample", "export"])
def test_nothing_was_trained_yet(cli: Cli, tmp_path: Path, command: str) -> None:
    target = tmp_path / "out"
    said = cli(command, target)
    assert said.code == 7
    assert "nothing was trained here yet" in said.err
    cli("identity")
    assert cli(command, target).code == 7
    unknown = cli(command, target, "--run", "beef")
    assert unknown.code == 6
    assert "'beef'" in unknown.err
    assert not target.exists()


def test_sample_goes_on_from_the_text(cli: Cli, trained: Manifest) -> None:
    said = cli("sample", "line 7", "--tokens", "20", "--seed", "3")
    assert said.code == 0, said.err
    assert said.out.startswith("line 7")
    assert said.err == "tiny, round 6:\n"
    assert all(c.isprintable() or c in "\n\t" for c in said.out), "no model draws on a terminal"
    assert cli("sample", "line 7", "--tokens", "20", "--seed", "3").out == said.out
    assert cli("sample", "line 7", "--run", trained.run_id()[:8], "--tokens", "1").code == 0
    assert cli("sample", "line 7", "--tokens", "0").code == 2


def test_a_corrupt_checkpoint_is_said_and_the_one_before_is_used(
    cli: Cli, trained: Manifest, tmp_path: Path
) -> None:
    before, newest = checkpoints(tmp_path / "home")
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    said = cli("sample", "line", "--tokens", "3")
    assert said.code == 0
    assert "warning: passed over a damaged file: " + newest.name in said.err
    assert "round 4" in said.err
    before.write_bytes(b"")
    said = cli("sample", "line", "--tokens", "3")
    assert said.code == 7
    assert "no checkpoint in" in said.err.splitlines()[-1]


def test_an_export_is_a_model_folder_that_anybody_can_load(
    cli: Cli, trained: Manifest, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "model"
    said = cli("export", target)
    assert said.code == 0, said.err
    assert "tiny after round 6" in said.out
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.config.hidden_size == 16
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.decode(tokenizer("hé")["input_ids"]) == "hé"
    written = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    again = cli("export", target)
    assert again.code == 2
    assert "not empty" in again.err
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == written
    (tmp_path / "empty").mkdir()
    assert cli("export", tmp_path / "empty").code == 0
    assert cli("export", next(iter(written))).code == 2, "a file is no folder"
    assert not list(tmp_path.glob(".*partial*"))


def test_a_model_without_its_manifest_says_how_to_get_it(
    cli: Cli, trained: Manifest, tmp_path: Path
) -> None:
    next((tmp_path / "home").glob("seat-1/runs/*/manifest.json")).unlink()
    said = cli("sample", "line")
    assert said.code == 7
    assert f"join --run {trained.run_id()[:12]}" in said.err
