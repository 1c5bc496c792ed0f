"""Which of its contributions a learner finds inside an outcome: only the one that it froze last."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from peer.exchange import Outcome, included_units
from protocols.blocks import BlockReport
from protocols.types import PeerId


class OwnWork:
    """Which contribution a learner has frozen last, and where it is inside.

    An outcome may hold one that this peer sent before it was restarted, or before it took another
    state, and that was made of other work. What is frozen now must not pass for that one, or it
    would be dropped without being in anybody's mean.
    """

    def __init__(self) -> None:
        self._frozen: tuple[int, tuple[float, BlockReport]] | None = None

    def froze(self, number: int, weight: float, report: BlockReport) -> None:
        """A contribution to round `number`."""
        self._frozen = number, (weight, report)

    def forget(self) -> None:
        """The local work is gone."""
        self._frozen = None

    def inside(self, number: int, outcomes: list[Outcome], me: PeerId) -> npt.NDArray[np.bool_]:
        """For every unit of round `number` whether that very contribution is inside its mean."""
        if self._frozen is None or self._frozen[0] != number:
            return np.zeros(sum(o.header.stop - o.header.start for o in outcomes), np.bool_)
        return included_units(outcomes, me, self._frozen[1])
