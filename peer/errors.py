"""What can go wrong in the world, always with the volunteer's next step, and the exit codes.

Protocol blunders of other peers are `protocols.errors.RemoteProtocolError`; those never end the
program.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar


class PeerError(Exception):
    """Something the owner of this machine can mend. The text ends with what to do next."""

    exit_code: ClassVar[int] = 1


class UsageError(PeerError):
    """The command line or a config field makes no sense."""

    exit_code: ClassVar[int] = 2


class ManifestError(PeerError):
    """A manifest or run description is wrong; the text names the field."""

    exit_code: ClassVar[int] = 3


class DataError(PeerError):
    """Training data is missing, empty or not text."""

    exit_code: ClassVar[int] = 4


class NetworkError(PeerError):
    """Nobody could be reached, or the port can't be had."""

    exit_code: ClassVar[int] = 5


class RunNotFoundError(PeerError):
    """No such run is known to the peers that answered."""

    exit_code: ClassVar[int] = 6


class StorageError(PeerError):
    """The disk is full, not writable, or holds nothing that can be read."""

    exit_code: ClassVar[int] = 7


class VersionError(PeerError):
    """This program is too old (or too new) for the run or its peers."""

    exit_code: ClassVar[int] = 8


class NotRunningError(PeerError):
    """A command needs a running peer, and none runs here."""

    exit_code: ClassVar[int] = 9


def flattened(error: BaseException) -> Iterator[BaseException]:
    """The errors inside (nested) groups: a TaskGroup wraps even a single one."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from flattened(inner)
    else:
        yield error
