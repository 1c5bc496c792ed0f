"""Measurements with a bar to clear: `python -m tests.bench` lists them, `... NAME` runs one.

A measurement is a module here with `run(quick, seed, progress) -> Result`, named in `registry`.
It compares with a reference in the same run, on the same machine, under the same load; it checks
what it timed; and it leaves no process behind, however it ends.
"""

import sys
from pathlib import Path

_CODECS = str(Path(__file__).resolve().parents[2] / "codecs")
if _CODECS not in sys.path:  # a checkout that was not installed
    sys.path.insert(0, _CODECS)
