"""Which way bulk goes between real peers, as `peer status` and the metrics tell their owners."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from tests.e2e.processes import ROOT, Fleet, check_agreement, fleet


async def status(it: Fleet, name: str) -> dict[str, Any]:
    """What `peer status` says of the one peer in that home."""
    asking = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "peer", "status", "--home", str(it.folder / name),
        "--format", "json", stdout=-1, cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'codecs'}"},
    )  # fmt: skip
    out, _ = await asking.communicate()
    told = json.loads(out)
    (only,) = told["peers"] if isinstance(told, dict) and "peers" in told else told
    lane: dict[str, Any] = only["lane"]
    return lane


async def test_peers_with_lanes_use_them_and_one_without_trains_along(tmp_path: Path) -> None:
    async with fleet(tmp_path) as it:
        it.start("a", founder=True)
        await it.started("a")
        it.start("b", via="a")
        it.start("c", "--no-lane", via="a")
        await it.together(*"abc", within_s=120)
        rounds = len(it["a"].rounds)
        await it.until(lambda: len(it["a"].rounds) >= rounds + 4)
        check_agreement([it[name] for name in "abc"])
        lanes = {name: await status(it, name) for name in "abc"}
        assert lanes["a"]["congestion_control"] in ("bbr", "cubic", "reno")
        for name, other in ("ab", "ba"):
            assert lanes[name]["to"].keys() <= {it[other].id}
            assert lanes[name]["failed"].keys() <= {"offer"}  # c has none
            assert lanes[name]["refused"] == {}
        # Who sends to whom is up to the elections; between these two it took the lane.
        assert lanes["a"]["opened"].get("lane", 0) + lanes["b"]["opened"].get("lane", 0) > 0
        assert lanes["a"]["accepted"] + lanes["b"]["accepted"] > 0
        assert lanes["c"]["port"] == lanes["c"]["accepted"] == 0
        assert lanes["c"]["opened"].keys() == {"libp2p"}
        for name in "abc":
            assert not it[name].all("PeerRefused")
