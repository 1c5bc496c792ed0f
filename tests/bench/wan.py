"""8 peers on two continents, against hivemind: thin, lossy and faulty lines, and peers that die.

All parts, one after another; each of them is a measurement of its own as well (`--part loss`).
"""

from __future__ import annotations

from typing import Final

from tests.bench import wan_faults, wan_goodput, wan_loss, wan_speed
from tests.bench.result import Progress, Result

_PARTS: Final = (wan_speed, wan_loss, wan_goodput, wan_faults)


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. Half an hour; quick: some minutes."""
    results = [part.run(quick, seed, progress) for part in _PARTS]
    return Result(
        rows=[row for result in results for row in result.rows],
        bars=[bar for result in results for bar in result.bars],
        # What several parts say is said once.
        notes=list(dict.fromkeys(note for result in results for note in result.notes)),
    )
