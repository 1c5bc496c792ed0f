"""A hybrid run over real libp2p: four processes, each training by its own means."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.e2e.processes import MANIFEST, check_agreement, check_once, fleet

HYBRID = MANIFEST.replace(
    "[inner]", '[method]\nkind = "hybrid"\nrank = 4\nalpha = 8.0\n\n[inner]'
).replace("[schedule]", "[schedule]\ngossip_every = 0")

MEANS = {
    "strong": (["--method", "lora:4"], "LoRA of rank 4"),
    "weak": (["--method", "lora:2"], "LoRA of rank 2"),
    "phone": (
        ["--method", "zo:4", "--upload", "1mbit"], "zeroth order, rank 2, 4 directions a step",
    ),
    "station": (["--method", "full"], "all values of the adapted layers"),
}  # fmt: skip


async def test_four_kinds_of_peers_train_one_model_and_lose_one_of_them(tmp_path: Path) -> None:
    async with fleet(tmp_path) as it:
        it.manifest.write_text(HYBRID)
        first, *others = MEANS
        it.start(first, *MEANS[first][0], founder=True)
        await it.started(first)
        for name in others:
            it.start(name, *MEANS[name][0], via=first)
        await it.together(*MEANS, within_s=120)
        start = it[first].rounds[-1]["round"]
        await it.until(lambda: all(it[n].rounds[-1]["round"] >= start + 3 for n in MEANS))
        processes = [it[n] for n in MEANS]
        check_agreement(processes)
        for name, (_, words) in MEANS.items():
            notices = [fact["text"] for fact in it[name].all("Notice")]
            assert f"this peer trains {words}: as its owner wishes" in notices
            assert not it[name].all("PeerRefused")
        losses = [
            f["validation_loss"] for f in it[first].rounds if f["validation_loss"] is not None
        ]
        assert losses[-1] < losses[0]
        plan = it[first].last("RoundPlanned")
        assert plan is not None
        aggregators = [p for p in processes if p.id in plan["aggregators"] and p.name != first]
        aggregators[-1].signal(signal.SIGKILL)
        rest = [p for p in processes if p is not aggregators[-1]]
        ids = {p.id for p in rest}
        await it.until(
            lambda: all(set(p.rounds[-1]["spans"][0]["contributors"]) == ids for p in rest)
        )
        check_agreement(rest)
        check_once(rest)
