"""Scenarios that were lived through are put on record by hundreds, and not lived through again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.bench import storm_many
from tests.bench.storm_many import Tally, many, on_record, put_on_record

CODE = "0123456789ab"


def line(seed: int, **more: Any) -> dict[str, Any]:
    return {
        "seed": seed,
        "peers": 2 + seed % 60,
        "faults": 2,
        "rounds": 10,
        "violations": [],
        **more,
    }


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storm_many, "RECORD", tmp_path / "storm-scenarios.json")
    monkeypatch.setattr(storm_many, "fingerprint", lambda: CODE)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    lines = [line(s) for s in range(1000, 1250) if s != 1199]
    lines[7]["violations"] = ["mass is conserved: of nothing"]
    lines[8] = {"seed": 1008, "peers": 5, "error": "a crash"}
    file = tmp_path / f"murmuration-storm-1000-{CODE}.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return tmp_path


def test_only_whole_hundreds_go_on_record(record: Path) -> None:
    assert put_on_record(1000) == 100
    (tally,) = on_record(CODE).values()
    assert tally.scenarios == sum(count for count, _, _ in tally.sizes) == 100
    assert tally.broken == [1007, 1008]
    assert sum(rounds for _, _, rounds in tally.sizes) == 990, "a crash has no rounds"
    assert on_record("another code") == {}


def test_what_is_on_record_is_not_run_again(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_record(1000)
    monkeypatch.setattr(storm_many, "live_through", _never)
    total = many(1000, 199, lambda _: None)
    assert total.scenarios == 199
    assert total.broken == [1007, 1008]
    total.merge(Tally(scenarios=1, broken=[5]))
    assert (total.scenarios, len(total.broken)) == (200, 3)


def _never(seed: int) -> dict[str, Any]:
    raise AssertionError(f"seed {seed} was lived through already")
