"""The mover's process and the words that it understands (their other side: `mover/control.c`)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Collection, Iterable
from typing import Final

from tests.netlab import namespaces, requirements
from tests.netlab.namespaces import LabError

ANSWER_S_MAX: Final = 30.0  # it takes microseconds; the machine may be busy
_END_S_MAX: Final = 60.0
_BATCH: Final = 256  # commands sent before their answers are read: both fit in a socket's buffer


class Mover:
    """One running mover, which ends when it is closed or when this process dies.

    It removes the laboratory called `prefix` then.
    """

    def __init__(self, prefix: str, tuns: Collection[int], nice: int) -> None:
        program = requirements.mover()
        ours, theirs = socket.socketpair()
        niceness = ["nice", "-n", str(nice)] if nice else []
        ending = [sys.executable, "-I", namespaces.__file__, prefix]
        with theirs:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [*niceness, str(program), *ending],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                pass_fds=tuns,
                start_new_session=True,  # a Ctrl-C is for the owner; the mover ends after it
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath)},
            )
        self.pid = self._process.pid
        ours.settimeout(ANSWER_S_MAX)
        self._socket = ours
        self._answers = ours.makefile("r", encoding="ascii", newline="\n")

    def tell(self, commands: Iterable[str]) -> None:
        """Commands without an answer.

        Raises:
            LabError: the mover refused one, or is gone.
        """
        waiting = list(commands)
        while waiting:
            batch, waiting = waiting[:_BATCH], waiting[_BATCH:]
            self._send(batch)
            for command in batch:
                for line in self._lines(command):
                    raise LabError(f"the mover answers {command!r} with {line!r}")

    def ask(self, command: str) -> list[list[str]]:
        """The words of each line of the answer."""
        self._send([command])
        return [line.split() for line in self._lines(command)]

    def close(self) -> None:
        """Ends the mover and waits until the laboratory is removed."""
        self._answers.close()
        self._socket.close()
        try:
            self._process.wait(_END_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise LabError("the mover did not end in time; it was killed") from None

    def _send(self, commands: list[str]) -> None:
        try:
            self._socket.sendall("".join(f"{c}\n" for c in commands).encode("ascii"))
        except OSError as error:
            raise LabError(f"the mover is gone: {error}") from error

    def _lines(self, command: str) -> Iterable[str]:
        while True:
            try:
                line = self._answers.readline()
            except OSError as error:
                raise LabError(f"the mover does not answer {command!r}: {error}") from error
            if not line:
                raise LabError(f"the mover ended at {command!r}")
            if line == "ok\n":
                return
            if line.startswith("error "):
                raise LabError(f"the mover refuses {command!r}: {line[6:].strip()}")
            yield line.rstrip("\n")
