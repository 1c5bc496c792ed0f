"""`python -m bootstrap` and `murmuration-bootstrap`: the node operators' program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (`peer.cli.ending.EXIT_CODES`).

    `argv`: without the program's name; None: this process's own.
    """
    try:
        from bootstrap.cli import app
        from peer.cli.ending import run_app
    except KeyboardInterrupt:  # typed before anything was loaded
        return 130
    installed = Path(sys.argv[0]).stem == "murmuration-bootstrap"
    return run_app(app, argv, "murmuration-bootstrap" if installed else "python -m bootstrap")


if __name__ == "__main__":
    sys.exit(main())
