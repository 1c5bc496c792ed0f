"""Scripts with a `transformers.Trainer` in one run, over real libp2p, beside a peer of our own."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.processes import MANIFEST, Fleet, Process, check_agreement, check_once, fleet
from tests.hook.script import rows

LORA = MANIFEST.replace("[inner]", '[method]\nkind = "lora"\nrank = 4\nalpha = 8.0\n\n[inner]')
RUNS = {
    "pretrain": MANIFEST.replace("[schedule]", "[outer]\nmomentum = 0.5\n\n[schedule]"),
    "lora": LORA.replace("[schedule]", "[schedule]\ngossip_every = 0"),
}


def script(it: Fleet, name: str, *more: str) -> Process:
    home = it.folder / name
    arguments = ["tests.e2e.hook_script", str(it.manifest), str(home), *more]
    it.processes[name] = Process(name, arguments, it.folder / f"{name}.err")
    return it.processes[name]


@pytest.mark.parametrize("kind", list(RUNS))
async def test_two_scripts_and_a_peer_train_one_model(tmp_path: Path, kind: str) -> None:
    async with fleet(tmp_path) as it:
        it.manifest.write_text(RUNS[kind])
        enough = tmp_path / "enough"
        one = script(it, "one", "--until", str(enough))
        await it.started("one")
        other = script(it, "other", "--via", one.address)
        letters = tmp_path / "letters.txt"  # what the scripts learn, for a peer that reads files
        lines = ("".join(map(chr, row["input_ids"])) for row in rows(1, 4000))
        letters.write_text("\n".join(lines))
        it.start("peer", "--site", "here", "--data", str(letters), via="one")
        await it.together("one", "other", "peer", within_s=120)
        since = one.rounds[-1]["round"]
        await it.until(lambda: one.rounds[-1]["round"] >= since + 2)
        processes = [it[name] for name in ("one", "other", "peer")]
        check_agreement(processes)
        check_once(processes)
        for process in processes:
            assert process.rounds[-1]["included"] == 1.0
            assert not process.all("PeerRefused")
        # Ctrl-C: the script ends, and its peer says goodbye.
        other.signal(signal.SIGINT)
        await it.until(lambda: other.code == 0)
        await it.until(
            lambda: any(
                fact["peer"] == other.id and fact["reason"].startswith("left")
                for fact in it["peer"].all("MemberSuspected")
            )
        )
        # The end of training: the last work is inside, and the model is the run's.
        enough.touch()
        await it.until(lambda: one.code == 0, within_s=120)
        one.read()
        ended = one.last("Ended")
        assert ended is not None
        assert ended["after"] < 0.95 * ended["before"]
        assert one.rounds[-1]["loss"] < one.rounds[0]["loss"]
        assert "lost" not in one.log.read_text()
        check_agreement(processes)
        check_once(processes)
