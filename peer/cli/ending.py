"""How every command ends: one line for people, and a stable exit code for scripts."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from peer.errors import PeerError, flattened

BUG: Final = 1
INTERRUPTED: Final = 130

EXIT_CODES: Final = (
    (0, "done; or left politely, as asked"),
    (BUG, "a bug in this program (a traceback is shown); or a simulated promise was broken"),
    (2, "the command line makes no sense, or an address is no peer's"),
    (3, "the manifest is wrong; the field is named"),
    (4, "the data is missing, empty or not text"),
    (5, "nobody could be reached, or the port is taken"),
    (6, "no such run is known"),
    (7, "the disk is full, not writable, or holds nothing that can be read"),
    (8, "this program is too old (or too new) for the run"),
    (9, "no peer is running here"),
    (INTERRUPTED, "interrupted: by a second Ctrl-C, or before anything had begun"),
)


def run_app(app: Callable[..., Any], argv: Sequence[str] | None, name: str) -> int:
    """Run a typer app on `argv` (None: this process's own); the exit code, whatever happens."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = app(args=arguments, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as leaving:  # typer's answer to a reader that went away (`| head`)
        return leaving.code if isinstance(leaving.code, int) else BUG
    except BrokenPipeError:
        return BUG
    except BaseException as error:  # the outermost place: whatever it is, it is explained here
        return explain(error, name)
    return code if isinstance(code, int) else 0


def explain(error: BaseException, name: str) -> int:
    """Say on stderr what went wrong in the program called `name`, and return its exit code."""
    causes = list(flattened(error))
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
        return INTERRUPTED
    lines: dict[str, int] = {}
    for cause in causes:
        # typer's own errors about the command line; their class has moved between its versions.
        usage = getattr(cause, "format_message", None)
        if isinstance(cause, PeerError):
            lines.setdefault(_one_line(str(cause)), cause.exit_code)
        elif usage is not None:
            lines.setdefault(f"{_one_line(usage())} ({_help(cause, name)})", 2)
        else:
            traceback.print_exception(error)
            say("error: this is a bug; please report it with what is above")
            return BUG
    for line in lines:
        say(f"error: {line}")
    return next(iter(lines.values()), BUG)


def say(line: str) -> None:
    """One line on stderr."""
    with suppress(OSError):  # nobody listens
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _help(error: BaseException, name: str) -> str:
    context = getattr(error, "ctx", None)
    return f"see {getattr(context, 'command_path', name)} --help"


def _one_line(text: str) -> str:
    """Fit for a terminal: an error may quote names that strangers chose."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
