"""What the laboratory needs of the machine, and the mover's program, compiled once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tests.netlab.namespaces import LabError

SOURCES: Final = Path(__file__).with_name("mover")
_FLAGS: Final = ("-O2", "-std=gnu11", "-fno-strict-aliasing", "-Wall", "-Wextra")
_COMPILE_S_MAX: Final = 120  # a second; two cores may be busy with something else


def missing() -> str | None:
    """A sentence that names what this machine lacks, or None."""
    if os.geteuid() != 0:
        return "the network laboratory needs root"
    if not Path("/dev/net/tun").exists():
        return "the network laboratory needs the device /dev/net/tun"
    for program, package in (("ip", "iproute2"), ("cc", "a C compiler")):
        if shutil.which(program) is None:
            return f"the network laboratory needs the program {program} ({package})"
    return None


def mover() -> Path:
    """The mover's program, built on first use and kept in the user's cache folder by the hash of
    its source, so a changed source is another program.

    Raises:
        LabError: it did not compile.
    """
    sources = sorted(SOURCES.glob("*.[ch]"))
    key = hashlib.sha256(repr(_FLAGS).encode())
    for source in sources:
        key.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "murmuration-netlab"
    program = cache / f"netlab-mover-{key.hexdigest()[:16]}"
    if program.exists():
        return program
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # moved into place whole
        made = Path(folder) / "mover"
        done = subprocess.run(
            ["cc", *_FLAGS, "-o", str(made), *(str(s) for s in sources if s.suffix == ".c")],
            capture_output=True, text=True, timeout=_COMPILE_S_MAX, check=False,
        )  # fmt: skip
        if done.returncode:
            raise LabError(f"the mover did not compile: {done.stderr}")
        made.rename(program)
    return program
