"""The kernel's account of connections, and whose they are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from peer.doctor import kernel
from peer.doctor.messages import Place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


def test_a_processes_own_connection_is_found_with_what_it_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        there = Place(*door.getsockname())
        with socket.create_connection((there.host, there.port)) as near, door.accept()[0] as far:
            before = kernel.connection_of(os.getpid(), [there])
            assert before is not None
            assert before.local == Place(*near.getsockname())
            near.sendall(b"x" * 1000)
            assert far.recv(1000)
            after = kernel.connection_of(os.getpid(), [there])
            assert after is not None
            assert (after.segments - before.segments, after.repeated) == (1, 0)


def test_another_processes_connection_to_the_same_place_is_not_ours() -> None:
    script = (
        "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1])));"
        " sys.stdin.read()"
    )
    with socket.create_server(("127.0.0.1", 0)) as door:
        there = Place(*door.getsockname())
        command = [sys.executable, "-c", script, str(there.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
            with door.accept()[0]:
                assert kernel.connection_of(os.getpid(), [there]) is None
                theirs = kernel.connection_of(child.pid, [there])
                assert theirs is not None
                assert theirs.remote == there
            child.terminate()


def test_own_addresses_are_no_loopback_ones() -> None:
    assert not any(host.startswith("127.") or host == "::1" for host in kernel.own_hosts())
