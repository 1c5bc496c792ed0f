"""Nothing is left behind: not at the end, not after an error, not after a SIGKILL."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.netlab import Host, Lab, Spec, namespaces
from tests.pages import ROOT

pytestmark = pytest.mark.usefixtures("machine")

SPEC = Spec(hosts=(Host("x", "a"), Host("y", "a")))
OWNER = """
import sys
from tests.netlab import Host, Lab, Spec
with Lab(Spec(hosts=(Host("x", "a"), Host("y", "a")))) as lab:
    child = lab.host("x").popen(["sleep", "600"])
    print(lab.host("x").namespace, child.pid, lab.mover_pid, flush=True)
    sys.stdin.read()
"""
END_S_MAX = 60  # milliseconds on a quiet machine


def owner() -> tuple[subprocess.Popen[str], str, int, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    namespace, child, mover = process.stdout.readline().split()
    return process, namespace, int(child), int(mover)


def ends(handle: int) -> bool:
    return bool(select.select([handle], [], [], END_S_MAX)[0])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_mover_cleans_up_after_an_owner_that_died(how: signal.Signals) -> None:
    process, namespace, child, mover = owner()
    handles = [os.pidfd_open(pid) for pid in (child, mover)]
    try:
        with process:
            assert namespace in namespaces.known()
            process.send_signal(how)
            assert process.wait(END_S_MAX) != 0
        assert all(ends(handle) for handle in handles)
    finally:
        for handle in handles:
            os.close(handle)
    prefix = namespace.rpartition("-")[0]
    assert not [name for name in namespaces.known() if name.startswith(prefix)]


def test_the_next_laboratory_sweeps_when_the_mover_died_too() -> None:
    process, namespace, child, mover = owner()
    handle = os.pidfd_open(child)
    with process:
        os.kill(mover, signal.SIGKILL)
        process.kill()
    assert namespace in namespaces.known()
    with Lab(SPEC):
        assert namespace not in namespaces.known()
        assert ends(handle)
    os.close(handle)


def test_a_sweep_leaves_the_living_alone() -> None:
    with Lab(SPEC) as lab:
        assert lab.host("x").namespace not in namespaces.sweep()
        assert lab.host("x").namespace in namespaces.known()
        with Lab(SPEC) as second:
            assert second.host("x").address == lab.host("x").address
        assert lab.counters().in_flight == 0


def test_an_error_in_the_block_removes_everything_and_is_passed_on() -> None:
    names: list[str] = []
    children = []

    def fail() -> None:
        with Lab(SPEC) as lab:
            children.append(lab.host("y").popen(["sleep", "600"]))
            names.extend(host.namespace for host in lab.hosts)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert children[0].returncode == -signal.SIGKILL
    assert not set(names) & set(namespaces.known())


def test_grandchildren_are_ended_too(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    with Lab(SPEC) as lab:
        shell = f"setsid sleep 600 & echo $! > {told}.new && mv {told}.new {told}"
        lab.host("x").run(["sh", "-c", f"({shell}) >/dev/null 2>&1 </dev/null"])
        handle = os.pidfd_open(int(told.read_text()))
        assert not select.select([handle], [], [], 0)[0]
    assert ends(handle)
    os.close(handle)
