"""`peer ledger` goes over the sums, and notices when they are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peer.cli.account import ledger
from peer.errors import StorageError

RUN = "ab" * 32


def counted(number: int, **changes: Any) -> dict[str, Any]:
    """Ten blocks in every round, by one peer."""
    plain = {
        "event": "BlocksCounted", "group": "site:a", "round": number,
        "by": {"12D3KooWann": [[10 * number, 10 * number + 10]]}, "again": {},
        "trained": 10 * number + 10, "repeated": 0, "unasked": 0, "reissued": 0, "lost": 0,
        "elsewhere": 0, "in_flight": 3, "held": 4, "waiting": 0, "floor": 10 * number + 10,
    }  # fmt: skip
    return plain | changes


def write(home: Path, seat: str, events: list[dict[str, Any]]) -> None:
    folder = home / seat
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    lines = [json.dumps({"t": 1.0, **event}) for event in events]
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"half a li')


def started() -> dict[str, Any]:
    return {"event": "Started", "run": RUN}


def test_a_whole_account_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = {"event": "BlocksReissued", "round": 2, "peer": "x", "blocks": [[5, 8]],
             "reason": "left"}  # fmt: skip
    for seat in ("seat-1", "seat-2"):
        write(tmp_path, seat, [started(), *(counted(n) for n in range(3)), taken])
    assert ledger(tmp_path, None, False) == 0
    out = capsys.readouterr().out
    assert out.count("the sums add up") == 2
    for wanted in ("30 trained, 3 in flight", "trained 30 blocks", "3 blocks: left"):
        assert wanted in out, out
    assert ledger(tmp_path, "seat-2", True) == 0
    (account,) = json.loads(capsys.readouterr().out)["accounts"]
    assert (account["run"], account["round"], account["rounds"]) == (RUN, 2, 3)
    assert account["by_peer"] == {"12D3KooWann": 30}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trained": 33}, "33 trained in all, not 20 + 10"),
        ({"by": {"x": [[15, 25]]}}, "trained before"),
        ({"floor": 99}, "99 needed"),
    ],
)
def test_what_does_not_add_up_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: str
) -> None:
    write(tmp_path, "seat-1", [started(), counted(0), counted(1), counted(2, **changes)])
    assert ledger(tmp_path, None, False) == 1
    assert told in capsys.readouterr().out


def test_peers_that_count_differently_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "seat-1", [started(), counted(0)])
    write(tmp_path, "seat-2", [started(), counted(0, in_flight=9)])
    assert ledger(tmp_path, None, False) == 1
    assert "peers differ: seat-2 and seat-1 after round 0" in capsys.readouterr().out


def test_without_a_log_it_says_where_one_comes_from(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="peer join"):
        ledger(tmp_path, None, False)
    write(tmp_path, "seat-1", [started(), {**counted(0), "trained": "many"}])
    with pytest.raises(StorageError, match="no event of this version"):
        ledger(tmp_path, None, False)
