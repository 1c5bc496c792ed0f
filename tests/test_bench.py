"""The benchmarks' own promises: honest bars, stable output, and nothing left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bench import join, machine, peers, processes, registry, tensors
from tests.bench.__main__ import main
from tests.bench.fleet import Fleet, FleetError
from tests.bench.learning import Pupils
from tests.bench.peers import Crew, Peer
from tests.bench.result import Bar, BenchError, Progress, Result

KEPT = Bar.at_most("half the time", 0.4, 0.5, "a stopwatch")
MISSED = Bar.at_least("all of it", 0.9, 1.0, "a ruler")


class Fake:
    """A measurement that measures nothing."""

    __doc__ = "A pretended measurement.\n\nIts details."

    def __init__(self, *bars: Bar, error: BaseException | None = None) -> None:
        self._result = Result([{"what": "a|b", "s": 1.23456}], bars, ["A note."])
        self._error = error
        self.asked: list[tuple[bool, int]] = []

    def run(self, quick: bool, seed: int, progress: Progress) -> Result:
        self.asked.append((quick, seed))
        progress("half way [there]")
        if self._error:
            raise self._error
        return self._result


def install(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> Fake:
    monkeypatch.setattr(registry, "MEASUREMENTS", {"fake": "fake_measurement"})
    monkeypatch.setitem(sys.modules, "fake_measurement", fake)
    return fake


# ── the command ──────────────────────────────────────────────────────────────────────────


def test_every_registered_measurement_loads_and_says_what_it_measures() -> None:
    for name in registry.MEASUREMENTS:
        assert callable(registry.load(name).run)
        assert len(registry.title(name)) > len(name)


def test_without_a_name_the_measurements_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, Fake())
    assert main([]) == 0
    assert capsys.readouterr().out.split(None, 1) == ["fake", "A pretended measurement.\n"]


def test_a_part_is_a_measurement_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = install(monkeypatch, Fake(KEPT))
    monkeypatch.setitem(registry.MEASUREMENTS, "fake-half", "fake_measurement")
    assert main(["fake", "--part", "half", "--seed", "7"]) == 0
    assert fake.asked == [(False, 7)]
    assert "tests.bench fake-half --seed 7" in capsys.readouterr().err
    assert main(["fake", "--part", "quarter"]) == 2


def test_an_unknown_name_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, Fake())
    assert main(["nonsense"]) == 2
    assert "choose one of: fake" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fake", "code"),
    [
        (Fake(KEPT), 0),
        (Fake(KEPT, MISSED), 1),
        (Fake(error=BenchError("the network is gone; plug it in")), 3),
        (Fake(error=KeyboardInterrupt()), 130),
    ],
)
def test_the_exit_code_tells_how_it_went(
    monkeypatch: pytest.MonkeyPatch, fake: Fake, code: int
) -> None:
    install(monkeypatch, fake)
    assert main(["fake"]) == code


def test_json_is_the_bars_and_nothing_else_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, Fake(KEPT, MISSED))
    assert main(["fake", "--format", "json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == [
        {
            "bar": "half the time",
            "value": 0.4,
            "must": "<= 0.5",
            "holds": True,
            "reference": "a stopwatch",
        },
        {
            "bar": "all of it",
            "value": 0.9,
            "must": ">= 1",
            "holds": False,
            "reference": "a ruler",
        },
    ]
    assert "half way [there]" in err


def test_a_given_seed_is_used_and_a_fresh_one_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = install(monkeypatch, Fake(KEPT))
    main(["fake", "--seed", "7", "--quick"])
    capsys.readouterr()
    main(["fake"])
    (given, fresh) = fake.asked
    assert given == (True, 7)
    assert f"--seed {fresh[1]}" in capsys.readouterr().err


def test_a_saved_page_says_what_was_run_where_and_what_came_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, Fake(KEPT))
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert main(["fake", "--seed", "7", "--save"]) == 0
    page = (tmp_path / "docs" / "results" / "fake.md").read_text()
    assert page.startswith("# A pretended measurement.\n\n    python -m tests.bench fake --seed 7")
    for fact in ("Date", "Machine", "Versions", "Commit", "Load average before", "after"):
        assert fact in page
    assert "| half the time | 0.4 | <= 0.5 | yes | a stopwatch |" in page
    assert r"| a\|b | 1.23 |" in page


def test_a_quick_result_is_not_for_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, Fake(KEPT))
    with pytest.raises(SystemExit, match="2"):
        main(["fake", "--quick", "--save"])
    assert fake.asked == []


def test_what_was_not_measured_does_not_hold() -> None:
    assert not Bar.at_most("x", None, 1.0, "").holds
    assert not Bar.at_most("x", float("nan"), 1.0, "").holds
    assert not Bar.at_least("x", float("nan"), 1.0, "").holds


# ── the proof of a mean ──────────────────────────────────────────────────────────────────

SIZE, NUMEL = 3, 2 * tensors.PIECE_VALUES + 77


def contributions(seed: int, round_: int) -> list[tensors.Float32]:
    made = [np.empty(NUMEL, np.float32) for _ in range(SIZE)]
    for peer, out in enumerate(made):
        tensors.contribution(seed, round_, peer, out)
    return made


def test_the_true_mean_passes_and_rounds_differ() -> None:
    mean = np.stack(contributions(5, 1)).mean(axis=0)
    found = tensors.check(5, 1, SIZE, mean)
    assert found.error < 1e-6
    assert found.error_max < 1e-5
    assert tensors.check(5, 2, SIZE, mean).error > 0.5


def test_a_hole_of_one_peer_in_one_piece_is_seen() -> None:
    made = contributions(5, 1)
    mean = np.stack(made).mean(axis=0)
    mean[-77:] -= made[1][-77:] / SIZE
    assert tensors.check(5, 1, SIZE, mean).error > 0.2
    mean[-1] = np.nan
    assert tensors.check(5, 1, SIZE, mean).error == np.inf


# ── fleets ───────────────────────────────────────────────────────────────────────────────

WORKER = """
import os, subprocess, sys, time
from tests.bench.worker import serve, serve_async

helper = subprocess.Popen(["sleep", "600"], start_new_session=True)

def start(index, size, via, word):
    print("noise from a library")
    return {"addresses": [word] if index == 0 else ["never used"], "via": via}

def average(number):
    if number == 13:
        raise RuntimeError("bad luck")
    return {"number": number, "index_seen": sys.argv[1]}

def burn():
    code = "import time\\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    return {}

def freeze():
    time.sleep(600)

handlers = {f.__name__: f for f in (start, average, burn, freeze)}
if sys.argv[1] == "sync":
    serve(handlers)
else:
    import asyncio
    def wrapped(function):
        async def handle(**arguments):
            return function(**arguments)
        return handle
    asyncio.run(serve_async({name: wrapped(f) for name, f in handlers.items()}))
"""


def fleet(kind: str = "sync", size: int = 2) -> Fleet:
    return Fleet("fake", "", size, command=[sys.executable, "-c", WORKER, kind])


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_all_workers_do_the_same_step_and_the_first_one_leads_the_way(kind: str) -> None:
    with fleet(kind, 3) as crew:
        crew.start(word="this way")
        took = crew.timed("average", 10, number=4)
        assert took.replies == [{"number": 4, "index_seen": kind}] * 3
        assert 0 < took.seconds < 10


def test_each_worker_may_stand_somewhere_else_and_be_told_something_of_its_own() -> None:
    code = WORKER.replace("sys.argv[1]}", "os.environ['PLACE']}")
    command = [sys.executable, "-c", code, "sync"]
    places = [["env", "PLACE=here"], ["env", "PLACE=there"]]
    with Fleet("fake", "", 2, command=command, places=places) as crew:
        crew.start([{"word": "a"}, {"word": "b"}])
        seen = crew.ask("average", 10, number=1)
    assert [reply["index_seen"] for reply in seen] == ["here", "there"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_who_is_hurt_in_the_middle_of_a_step_need_not_answer_and_is_left_out(
    how: signal.Signals,
) -> None:
    with fleet("sync", 3) as crew:
        crew.start(word="x")
        took = crew.timed("average", 10, meanwhile=lambda: crew.hurt(1, how), number=4)
        assert list(took.each_s) == crew.present == [0, 2]
        assert len(crew.ask("average", 10, number=5)) == 2
        left = 6 if how == signal.SIGSTOP else 4  # each has a helper, which shares its fate
        assert processes.wait_until(lambda: len(processes.running(crew.family)) == left, 10)
    assert processes.running(crew.family) == []


def test_the_cpu_time_of_helpers_that_came_and_went_is_counted() -> None:
    with fleet() as crew:
        crew.start(word="x")
        assert 0.5 <= crew.timed("burn", 20).cpu_s < 2.0  # each process loses up to two ticks
        assert crew.timed("average", 10, number=1).cpu_s < 0.2


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt(), BenchError("no")])
def test_nothing_is_left_however_a_fleet_ends(failure: BaseException | None) -> None:
    crew = fleet()
    with suppress(KeyboardInterrupt, BenchError), crew:
        crew.start(word="x")
        assert len(processes.running(crew.family)) == 4
        if failure:
            raise failure
    assert processes.running(crew.family) == []


def test_a_worker_that_fails_is_named_with_its_last_words() -> None:
    with fleet() as crew:
        crew.start(word="x")
        with pytest.raises(FleetError, match=r"worker fake-0 died[\s\S]*bad luck"):
            crew.ask("average", 10, number=13)
    assert processes.running(crew.family) == []


def test_a_worker_that_does_not_answer_is_not_waited_for() -> None:
    with fleet() as crew:
        crew.start(word="x")
        with pytest.raises(FleetError, match="did not answer in time"):
            crew.ask("freeze", 0.3)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_do_not_outlive_a_bench_that_is_ended(how: signal.Signals, tmp_path: Path) -> None:
    script = """
import sys
from tests.bench import registry
from tests.bench.__main__ import main
from tests.test_bench import fleet
class Endless:
    __doc__ = "Never done."
    def run(self, quick, seed, progress):
        with fleet() as crew:
            crew.start(word="x")
            print(crew.family, flush=True)
            crew.ask("freeze", 60)
sys.modules["endless"] = Endless()
registry.MEASUREMENTS["endless"] = "endless"
sys.exit(main(["endless"]))
"""
    bench = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=machine.ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert bench.stdout is not None
    family = bench.stdout.readline().strip()
    try:
        assert len(processes.running(family)) == 4
        bench.send_signal(how)
        assert bench.wait(timeout=20) == (130 if how != signal.SIGKILL else -signal.SIGKILL)
        assert processes.wait_until(lambda: not processes.running(family), 10)
    finally:
        bench.kill()
        bench.communicate()
        processes.kill_family(family)


# ── peers from outside ───────────────────────────────────────────────────────────────────


class Said(Peer):
    """A peer of which only its events are known."""

    def __init__(self, *events: dict[str, Any]) -> None:
        self.events = list(events)


def test_a_join_is_over_when_work_went_out_that_a_round_then_held() -> None:
    def sent(number: int, weight: float) -> dict[str, Any]:
        return {"event": "ContributionSent", "round": number, "weight": weight}

    def finished(number: int, included: float) -> dict[str, Any]:
        return {"event": "RoundFinished", "round": number, "included": included}

    events = [sent(4, 0.0), finished(4, 1.0), sent(5, 9.0), finished(5, 0.0), sent(6, 9.0)]
    assert join._counted(Said(*events)) is None
    events.append(finished(6, 0.5))
    assert join._counted(Said(*events)) == (sent(6, 9.0), finished(6, 0.5))


def test_nothing_is_left_of_a_crew_even_if_its_bench_is_killed(tmp_path: Path) -> None:
    script = """
import os, subprocess
from tests.bench import processes
from tests.bench.peers import Crew
with Crew() as crew:
    environment = {**os.environ, processes.MARK: crew.family}
    subprocess.Popen(["sleep", "600"], env=environment, start_new_session=True)
    print(crew.family, flush=True)
    input()
"""
    for how in (None, signal.SIGKILL):
        bench = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=machine.ROOT,
            env={**os.environ, "PYTHONPATH": str(machine.ROOT), "TMPDIR": str(tmp_path)},
        )
        assert bench.stdout is not None
        family = bench.stdout.readline().strip()
        try:
            assert len(processes.running(family)) == 1
            if how is not None:
                bench.send_signal(how)
            bench.communicate("\n", timeout=20)
            assert processes.wait_until(lambda name=family: not processes.running(name), 10)  # type: ignore[misc]
        finally:
            bench.kill()
            bench.communicate()
            processes.kill_family(family)


def test_a_helper_that_fails_is_told_with_its_last_words() -> None:
    with Crew() as crew:
        assert crew.run("print(3)", 20) == "3\n"
        with pytest.raises(BenchError, match="bad luck"):
            crew.run("raise SystemExit('bad luck')", 20)


def test_a_thread_that_waits_is_asleep_and_one_that_works_or_queues_is_not() -> None:
    started = peers.moment(os.getpid())
    threading.Event().wait(0.3)
    waited = peers.moment(os.getpid())
    end_s = time.monotonic() + 0.3
    while time.monotonic() < end_s:
        pass
    worked = peers.moment(os.getpid())
    assert peers.asleep_share(started, waited) > 0.8
    assert peers.asleep_share(waited, worked) < 0.2


def test_memory_is_in_mebibytes() -> None:
    before = peers.memory(os.getpid())
    ballast = np.ones(64 * 2**20, np.uint8)
    after = peers.memory(os.getpid())
    assert 60 < after.resident - before.resident < 70
    assert after.peak >= after.resident
    assert after.proportional <= after.resident
    del ballast


def test_a_loss_is_the_median_of_three_rounds_and_unknown_before_the_first() -> None:
    losses = [(1.0, 3.0), (2.0, 2.0), (3.0, 2.5), (4.0, 9.0)]
    rounds = [{"at_s": at_s, "loss": loss, "contributors": 1 + (at_s > 2)} for at_s, loss in losses]
    group = Pupils(rounds, [10, 9], "")
    assert [group.loss(at_s) for at_s in (1.5, 3.9)] == [3.0, 2.5]
    assert group.final == 2.5
    assert group.together == 0.5
    with pytest.raises(BenchError, match="no round was finished"):
        group.loss(0.5)
