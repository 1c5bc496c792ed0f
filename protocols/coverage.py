"""Since when a member's work is inside: what tells that a block of its data is trained.

A contribution to a unit holds all of its sender's work that the unit has not had yet. So once every
unit was inside an outcome in round n or later, all that was done before round n's contribution is.
With fragments a round exchanges some of the units, and a thin line brings in some of those, so per
fragment there is a round since which all of it is in, and a mask that is on its way to the next.
"""

from __future__ import annotations

from protocols import limits
from protocols.fragments import Fragments

NEVER = -1


class Coverage:
    """One member's; moved by applied outcomes."""

    def __init__(self, fragments: Fragments) -> None:
        self._fragments = fragments
        self.whole = [NEVER] * fragments.count
        """Fragment -> each of its units was inside in this round or later."""
        self.begun = [NEVER] * fragments.count
        """Fragment -> the first round of its units in `cover`."""
        self.cover = 0
        """Bit i: unit i was inside since its fragment was `begun`; never all of a fragment."""

    @property
    def since(self) -> int:
        """What was frozen by then is wholly inside."""
        return min(self.whole)

    def add(self, number: int, cover: int) -> None:
        """Round `number`'s outcome has these units (bit i: unit i)."""
        units = self._fragments.of(number)
        index = number % self._fragments.count
        every = ((1 << len(units)) - 1) << units.start
        now, before = cover & every, self.cover & every
        self.cover &= ~every
        if now == every:
            self.whole[index] = number
            return
        if not before:
            self.begun[index] = number
        elif now | before == every:
            self.whole[index], self.begun[index] = self.begun[index], number
            before = 0
        # What a layout of this size would cost to remember is not worth it: it counts in one go.
        if self._fragments.units <= limits.LEDGER_COVER_UNITS_MAX:
            self.cover |= now | before

    def copy(self) -> Coverage:
        twin = Coverage(self._fragments)
        twin.whole, twin.begun, twin.cover = self.whole[:], self.begun[:], self.cover
        return twin
