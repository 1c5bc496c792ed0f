"""A group's questions are scored once each, by whoever's share they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from peer.errors import DataError, ManifestError
from peer.manifest import Asset, DataSpec, Manifest
from peer.manifest_evaluation import EvaluationSpec
from peer.manifest_toml import read_toml, stage_assets
from peer.train import build_data, build_method, build_tokenizer
from peer.train.questions import Questions, build_questions
from peer.train.scoring import Score
from tests.train.chat_tiny import lines
from tests.train.tiny import manifest

TOML = """
name = "asked"
[model.config]
model_type = "llama"
vocab_size = 260
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 64
[data]
sequence_length = 48
[evaluation]
rows = 100
answer_tokens = 2
paths = ["asked.jsonl"]
"""


def _rows(count: int) -> list[dict[str, Any]]:
    return [{"question": f"{n}?", "answer": "six", "choices": ["six", "ten"]} for n in range(count)]


def _questions(folder: Path, **changes: Any) -> tuple[Manifest, Questions]:
    lines(folder / "asked.jsonl", _rows(23))
    draft = read_toml(TOML, folder)
    run = dataclasses.replace(
        draft.manifest, evaluation=dataclasses.replace(draft.manifest.evaluation, **changes)
    )
    stage_assets(draft.files, folder / "assets")
    found = build_questions(run, folder / "assets", None, own_data=False)
    assert found is not None
    return run, found


def test_shares_are_the_whole_and_meet_nowhere(tmp_path: Path) -> None:
    _, questions = _questions(tmp_path)
    for count in (1, 2, 3, 16, 40):
        shares = [questions.share(index, count) for index in range(count)]
        assert sorted(row for share in shares for row in share) == list(range(23))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    _, few = _questions(tmp_path, rows=4)
    assert len(few.share(0, 2)) == 4
    assert few.share(0, 2) == questions.share(0, 2)[:4]


def test_the_sum_of_the_shares_is_what_one_would_score(tmp_path: Path) -> None:
    run, questions = _questions(tmp_path)
    with build_method(run, device="cpu", threads=1).outer_model() as model:
        whole = questions.score(model, 0, 1)
        total = Score()
        for index in range(3):
            total += questions.score(model, index, 3)
    assert whole.rows == whole.asked == whole.questions == 23
    assert abs(total.nats - whole.nats) < 1e-3
    assert dataclasses.replace(total, nats=0.0) == dataclasses.replace(whole, nats=0.0)


def test_what_data_holds_out_is_shared_where_the_run_brings_it_and_else_its_owners(
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    lines(file, _rows(40))
    run = dataclasses.replace(
        manifest(),
        data=DataSpec(source="chat", sequence_length=48, validation_share=0.5),
        evaluation=EvaluationSpec(rows=100),
    )
    tokenizer = build_tokenizer(run)
    source = build_data(run, None, tokenizer, [file])
    own = build_questions(run, None, source, own_data=True)
    assert own is not None
    assert own.share(0, 2) == own.share(1, 2)
    asset = Asset(name="data/000", sha256="ab" * 32, bytes=1)
    brought = dataclasses.replace(
        run, data=dataclasses.replace(run.data, paths=("data/000",)), assets=(asset,)
    )
    shared = build_questions(brought, None, source, own_data=False)
    assert shared is not None
    assert sorted(shared.share(0, 2) + shared.share(1, 2)) == sorted(own.share(0, 1))
    assert build_questions(manifest(), None, source, own_data=True) is None
    assert build_questions(run, None, None, own_data=True) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": 0}, "evaluation.rows"),
        ({"rows": 5000}, "evaluation.rows"),
        ({"answer_tokens": 2000}, "evaluation.answer_tokens"),
        ({"paths": ("data/000",)}, "evaluation.paths"),
        ({"paths": ()}, "evaluation.paths"),
    ],
)
def test_what_can_not_be_evaluated_is_named(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ManifestError, match=says):
        _questions(tmp_path, **changes)


def test_files_of_questions_are_looked_at_when_the_run_is_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_toml(TOML, tmp_path)
    with pytest.raises(ManifestError, match=r"evaluation\.paths"):
        read_toml(TOML.replace('["asked.jsonl"]', '"asked.jsonl"'), tmp_path)
    lines(tmp_path / "asked.jsonl", _rows(3))
    with pytest.raises(ManifestError, match=r"schedule\.evaluate_every"):
        read_toml(TOML + "[schedule]\nevaluate_every = 0\n", tmp_path)
    draft = read_toml(TOML, tmp_path)
    assert draft.manifest.evaluation.paths == ("data/questions-000",)
    assert Manifest.from_canonical(draft.manifest.to_canonical()) == draft.manifest
