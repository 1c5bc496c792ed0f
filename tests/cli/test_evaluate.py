"""`evaluate`: a checkpoint, a model folder or an adapter, on files of questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from peer.checkpoint import CheckpointStore
from peer.finding import save_manifest
from peer.home import open_seat
from peer.manifest import Manifest
from peer.manifest_toml import read_toml
from peer.train import build_method
from peer.train.inner import save_model
from peer.train.models import seeded_model
from peer.train.tokens import ByteTokenizer
from tests.cli.conftest import Cli
from tests.cli.manifests import TINY
from tests.train.chat_tiny import lines, sums

LORA = TINY.replace("[inner]", '[method]\nkind = "lora"\nrank = 2\n[inner]').replace(
    "[schedule]", "[schedule]\ngossip_every = 0"
)
RUN = LORA.replace('source = "text"\npaths = ["text.txt"]\n', "")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a checkpoint of round 3 of a lora run, and beside it an export of it."""
    folder = tmp_path_factory.mktemp("evaluate")
    manifest: Manifest = read_toml(RUN, folder).manifest
    with open_seat(folder / "home") as seat:
        run = seat.run_folder(manifest.run_id())
        save_manifest(run, manifest)
        method = build_method(manifest, None, "cpu", 1)
        state = method.state()
        state["factors"] += 0.05
        CheckpointStore(run / "checkpoints").save(3, state, {}, {})
        seat.remember(run=manifest.run_id())
    return folder


@pytest.fixture
def told(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("MURMURATION_HOME", str(home / "home"))
    return cli


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    lines(folder / "sums.jsonl", [*sums(12), {"question": "unanswered"}])
    lines(folder / "legs.jsonl", [
        {"question": f"legs {n}", "choices": ["six", "eight"], "answer": n % 2, "task": "Legs"}
        for n in range(6)
    ])  # fmt: skip
    return folder


def test_the_newest_checkpoint_is_scored(told: Cli, questions: Path) -> None:
    said = told("evaluate", questions, "--length", "64", "--tokens", "4")
    assert said.code == 0, said.err
    first, head, *rows = said.out.splitlines()
    assert first == "tiny, round 3: 18 rows of 2 files, plain chat format, samples of 64 tokens"
    assert head.split() == [
        "rows", "tokens", "perplexity", "exact", "match", "accuracy", "accuracy", "per", "byte",
    ]  # fmt: skip
    assert [row.split()[0] for row in rows] == ["Legs", "sums", "overall"]
    assert rows[1].split()[1:3] == ["12", "24"]
    assert rows[1].split()[-2:] == ["-", "-"]
    assert said.err == f"left out: {questions}/sums.jsonl:13: has no answer: answer is missing\n"


def test_a_script_reads_it_as_json(told: Cli, questions: Path) -> None:
    said = told("evaluate", questions, "--length", "64", "--format", "json", "--rows", "5")
    assert said.code == 0, said.err
    report = json.loads(said.out)
    assert {name: task["rows"] for name, task in report["tasks"].items()} == {"Legs": 5, "sums": 5}
    overall = report["overall"]
    assert overall["rows"] == 10
    assert 100 < overall["perplexity"] < 1000
    assert overall["exact_match"] is None
    assert overall["questions"] == 5
    assert report["refused"]["count"] == 1
    again = json.loads(
        told("evaluate", questions, "--length", "64", "--format", "json", "--rows", "5").out
    )
    assert again == report
    part = told("evaluate", questions, "--length", "64", "--format", "json", "--held-out", "0.3")
    assert 0 < json.loads(part.out)["overall"]["rows"] < 12


def test_an_export_and_its_adapter_score_like_the_checkpoint(
    told: Cli, questions: Path, tmp_path: Path
) -> None:
    def loss(*argv: object) -> float:
        said = told("evaluate", questions, "--length", "64", "--format", "json", *argv)
        assert said.code == 0, said.err
        return float(json.loads(said.out)["overall"]["loss"])

    target = tmp_path / "model"
    assert told("export", target).code == 0
    base = tmp_path / "base"
    save_model(seeded_model(read_toml(RUN, tmp_path).manifest.model.config, 0), base)
    ByteTokenizer().save(base)
    checkpoint = loss()
    assert loss("--model", target) == pytest.approx(checkpoint, rel=1e-4)
    adapted = loss("--model", base, "--adapter", target / "adapter")
    assert adapted == pytest.approx(checkpoint, rel=1e-4)
    assert loss("--model", base) != pytest.approx(checkpoint, rel=1e-3)
    small = {**read_toml(RUN, tmp_path).manifest.model.config, "hidden_size": 32}
    save_model(seeded_model(small, 0), tmp_path / "other")
    ByteTokenizer().save(tmp_path / "other")
    half = tmp_path / "half"
    shutil.copytree(target / "adapter", half)
    tensors = load_file(half / "adapter_model.safetensors")
    gone = tensors.pop(min(tensors))
    save_file(tensors, half / "adapter_model.safetensors")
    assert gone.numel()
    for model, adapter in ((tmp_path / "other", target / "adapter"), (base, half)):
        said = told("evaluate", questions, "--model", model, "--adapter", adapter)
        assert said.code == 7, adapter
        assert "is no adapter of this model" in said.err


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--adapter", "x"], 2, "--adapter needs --model"),
        (["--model", "x", "--run", "ab"], 2, "take away one"),
        (["--model", "nowhere"], 7, "no tokenizer.json"),
        (["--run", "beef"], 6, "beef"),
        (["--tokens", "64", "--length", "64"], 2, "leaves no room"),
        (["--length", "8"], 4, "no row fits into 8 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(
    told: Cli, tmp_path: Path, options: list[str], code: int, text: str
) -> None:
    file = lines(tmp_path / "a.jsonl", [{"question": "q", "answer": "a long answer"}])
    said = told("evaluate", file, *options)
    assert (said.code, said.out) == (code, "")
    assert text in said.err


def test_data_that_cannot_be_used_is_named(told: Cli, tmp_path: Path) -> None:
    assert told("evaluate").code == 2
    said = told("evaluate", tmp_path / "nowhere")
    assert (said.code, "nowhere" in said.err) == (4, True)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    said = told("evaluate", tmp_path / "a.jsonl")
    assert said.code == 4
    assert "a.jsonl:1: has text; it needs messages" in said.err


def test_a_folder_without_an_adapter_is_said(told: Cli, tmp_path: Path, questions: Path) -> None:
    target = tmp_path / "model"
    assert told("export", target).code == 0
    said = told("evaluate", questions, "--model", target, "--adapter", tmp_path)
    assert said.code == 7
    assert "no adapter_config.json there" in said.err
