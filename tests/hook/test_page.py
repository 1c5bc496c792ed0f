"""The script that the guide shows runs as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import pages
from tests.pages import ROOT

PAGE = ROOT / "docs" / "finetuning.md"
SCRIPT_S_MAX = 180  # some ten seconds on a quiet machine; most of it is importing torch


def test_the_guides_script_runs_as_written(tmp_path: Path) -> None:
    (run,) = pages.blocks(PAGE, "toml")
    (script,) = pages.blocks(PAGE, "python")
    assert 'host="127.0.0.1"' in script, "a test must not open a port to the world"
    (tmp_path / "tune.toml").write_text(run)
    environment = os.environ | {
        "MURMURATION_HOME": str(tmp_path / "home"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'codecs'}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=SCRIPT_S_MAX,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "murmuration: others join with: python -m peer join --via /ip4/127.0.0.1/" in done.stderr
    assert "murmuration: left: asked to leave" in done.stderr
    assert "lost" not in done.stderr
