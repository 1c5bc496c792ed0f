"""A zeroth-order run over real libp2p: its aggregator is killed, and somebody comes late."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.e2e.processes import MANIFEST, check_agreement, check_once, fleet

ZO = (
    MANIFEST.replace("lr = 3e-3\nbatch_size = 4\nwarmup_steps = 5", "lr = 0.05\nbatch_size = 8")
    + """gossip_every = 0

[method]
kind = "zo"

[zeroth]
adapters = false
perturbations = 8
noise = "rademacher"
"""
)


async def test_a_zeroth_order_run_survives_its_aggregator_and_a_late_joiner_replays_its_log(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path) as it:
        it.manifest.write_text(ZO)
        it.start("a", founder=True)
        await it.started("a")
        for name in "bc":
            it.start(name, via="a")
        await it.together(*"abc", within_s=120)
        processes = [it[name] for name in "abc"]
        counts = {p.name: len(p.all("ContributionSent")) for p in processes}
        # In the middle: somebody's entry of the round is out, and nobody has applied it.
        await it.until(
            lambda: any(len(p.all("ContributionSent")) > counts[p.name] for p in processes)
        )
        plan = it["a"].last("RoundPlanned")
        assert plan is not None
        (aggregator,) = set(plan["aggregators"])
        dead = next(p for p in processes if p.id == aggregator)
        dead.signal(signal.SIGKILL)
        rest = [p for p in processes if p is not dead]
        it.start("late", via=rest[0].name)  # while they find out
        names = [p.name for p in rest] + ["late"]
        await it.together(*names, within_s=120)
        assert it["late"].all("StateReceived")
        assert any("loops for random" in f["text"] for f in it["late"].all("Notice"))
        living = [it[name] for name in names]
        check_agreement([*processes, it["late"]])
        check_once(living)
        assert not any(p.all("DigestDiffered") or p.all("PeerRefused") for p in living)
        losses = [f["validation_loss"] for p in rest for f in p.rounds if f["validation_loss"]]
        assert min(losses) < losses[0]
