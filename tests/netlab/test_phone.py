"""A phone takes part: a line of 1 Mbit/s and little memory, beside two that have plenty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.processes import MANIFEST, Process, check_agreement, check_once, fleet
from tests.netlab import Host, Lab, Line, Route, Spec

pytestmark = pytest.mark.usefixtures("machine")

HYBRID = MANIFEST.replace(
    "[inner]", '[method]\nkind = "hybrid"\nrank = 4\nalpha = 8.0\n\n[inner]'
).replace("[schedule]", "[schedule]\ngossip_every = 0")
MBPS = 1.0
MEMORY_BYTES = 512 * 2**20  # the model's own half a megabyte included
SPEC = Spec(
    hosts=(
        Host("desk", "z", line=Line(up_mbps=100.0, down_mbps=100.0)),
        Host("office", "z", line=Line(up_mbps=100.0, down_mbps=100.0)),
        Host("phone", "z", line=Line(up_mbps=MBPS, down_mbps=MBPS)),
    ),
    routes=(Route(a="z", b="z", rtt_ms=20),),
)


def little_memory() -> list[str]:
    """A command that lets what follows have so much memory of its own and no more: mapped files
    (the libraries' code) don't count, what threads' stacks may become does."""
    limits = f"ulimit -s 1024 && ulimit -d {MEMORY_BYTES // 1024}"
    return ["sh", "-c", f'{limits} && exec "$@"', "phone"]


def limits_of(process: Process) -> str:
    return Path(f"/proc/{process.pid}/limits").read_text()


async def test_a_phone_takes_part_in_a_hybrid_run(tmp_path: Path) -> None:
    with Lab(SPEC) as lab:
        async with fleet(tmp_path) as it:
            it.manifest.write_text(HYBRID)
            hosts = {name: lab.host(name) for name in ("desk", "office", "phone")}
            it.start(
                "desk", "--method", "lora:4", founder=True,
                host=hosts["desk"].address, within=hosts["desk"].command([]),
            )  # fmt: skip
            await it.started("desk")
            it.start(
                "office", "--method", "lora:4", via="desk",
                host=hosts["office"].address, within=hosts["office"].command([]),
            )  # fmt: skip
            phone = it.start(
                "phone", "--method", "zo:4", via="desk", host=hosts["phone"].address,
                within=[*hosts["phone"].command([]), *little_memory()],
            )  # fmt: skip
            await it.together("desk", "office", "phone", within_s=180)
            start = it["desk"].rounds[-1]["round"]
            everybody = [it[n] for n in hosts]
            await it.until(lambda: all(p.rounds[-1]["round"] >= start + 5 for p in everybody))
            check_agreement(everybody)
            check_once(everybody)
            inside = [
                phone.id in span["contributors"]
                for fact in it["desk"].rounds
                if fact["round"] > start
                for span in fact["spans"]
            ]
            assert sum(inside) >= 0.8 * len(inside)
            assert f"Max data size             {MEMORY_BYTES}" in limits_of(phone)
