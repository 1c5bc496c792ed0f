"""Healing: another's state where ours is missing, wrong or outvoted.

Members of a group compare digests every round; the minority takes the majority's state, and who
went on with few while more went on without it steps back. A donor that fails is avoided for a
while, twice as long each time.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter as Tally
from typing import Final

from protocols import limits
from protocols.election import candidates
from protocols.events import Agreed, Differed, Effect, FetchState
from protocols.membership import Neighbour, seat_of
from protocols.standing import RETRY_S, Attempt, Outlook, Standing
from protocols.types import Digest, PeerId

STEP_BACK_S: Final = 3.0  # a majority apart must last; others finish a round a little earlier
STATE_FETCH_S: Final = 600.0  # then another donor is asked; a stalled stream fails much sooner
STATE_EXCHANGES: Final = 20  # or so many exchanges: 64 bits per parameter against 3 or more of q4
STATE_STALL_S: Final = 120.0  # however long it takes, as long as more comes within this time
DONOR_BACKOFF_S_MAX: Final = 600.0


class Healing:
    """One state transfer at a time, and the comparison of digests that calls for it."""

    def __init__(self, standing: Standing) -> None:
        self._here = standing
        self._fetch: Attempt | None = None
        self._common = -1
        """Of the state on its way: the latest round at which its history was ours; -1: unknown."""
        self._bad_donors: dict[PeerId, tuple[float, float]] = {}
        """Donor -> (until when it is avoided, for how long the next time)."""
        self._apart_since_s = self._apart_seen_s = -math.inf
        """A majority with fewer rounds goes on without us: since when, and when we last saw it."""
        self._compared: Outlook | None = None
        """When the digests that we saw last were all the same."""

    @property
    def fetching(self) -> bool:
        """Whether a state is on its way."""
        return self._fetch is not None

    @property
    def from_afar(self) -> bool:
        """Whether the state on its way is that of another group than ours."""
        here = self._here
        donor = here.members.get(self._fetch.peer) if self._fetch is not None else None
        return donor is not None and bool(here.group) and donor.group != here.group

    def fetched(self, number: int, digest: Digest) -> None:
        """The state came. Whom we agreed with before shares only what it has in common with that
        one, as far as we know: or who steps back would go forth again with those it came from."""
        here = self._here
        for n in here.members.in_group(here.group):
            if (n.round, n.digest) != (number, digest):
                n.agreed, n.apart = min(n.agreed, self._common), True
        if self._fetch is not None:
            donor = here.members.get(self._fetch.peer)
            fellow = donor is not None and donor.group == here.group
            here.firm_round = donor.firm if donor is not None and fellow else 0
        here.firm_round = min(here.firm_round, number)  # else from our own disk
        here.since = number
        self._fetch = None
        self._apart_since_s = self._apart_seen_s = -math.inf
        self._bad_donors.clear()

    def failed(self, donor: PeerId, now_s: float, *, busy: bool = False) -> None:
        """The donor could not give it, or is `busy` with other newcomers: that is no fault."""
        self._fetch = None
        if busy:
            self._bad_donors[donor] = (now_s + RETRY_S, RETRY_S)
        else:
            self._avoid(donor, now_s)

    def coming(self, now_s: float) -> None:
        """It takes long, and goes on."""
        if self._fetch is not None:
            self._fetch.until_s = max(self._fetch.until_s, now_s + STATE_STALL_S)

    def expire(self, now_s: float) -> None:
        """Give up a donor that took too long."""
        if self._fetch is not None and now_s >= self._fetch.until_s:
            self.failed(self._fetch.peer, now_s)

    def step_back(self, now_s: float) -> list[Effect]:
        """We have more rounds than a majority that went on without us: theirs count."""
        here = self._here
        outlook = here.outlook(now_s)
        if not outlook.behind:
            return []
        live = outlook.live
        latest = here.current or here.previous
        ours = set(latest.plan.peers) if latest is not None else set()
        others = [
            n for n in live if n.ready and 0 < n.round < here.round
            and n.record.peer not in ours and not self._fellow(n)
        ]  # fmt: skip
        camps = Tally((n.round, n.digest) for n in others)
        best = max(camps, key=lambda c: (camps[c], c), default=None)
        if best is None:
            return []
        donors = [n for n in others if (n.round, n.digest) == best]
        if not self._outweighed(donors, here.camp(live), now_s):
            return []
        # Between two sights of it some of them have applied a round and others have not, and where
        # rounds are short that is all the time that there is.
        if now_s - self._apart_seen_s > STEP_BACK_S:
            self._apart_since_s = now_s
        self._apart_seen_s = now_s
        if now_s - self._apart_since_s < STEP_BACK_S:
            return []
        return self.fetch_state(donors, now_s, step_back=True)

    def overtaken_by(self, now_s: float) -> list[Neighbour]:
        """Those with more rounds whose state should take the place of ours, the best first.

        Fellows of our history come before all others. Those of another have to be as many as we
        are, or it is they who must come back; and we are not alone where our fellows have yet to
        apply the round that we have just applied.
        """
        here = self._here
        outlook = here.outlook(now_s)
        fellows = {n.record.peer for n in outlook.live if self._fellow(n)}
        ours = [n for n in outlook.ahead if n.record.peer in fellows]
        if ours:
            return ours
        camp = 1 + len(fellows)
        if here.round and self._weight(outlook.ahead, now_s) < self._own_weight(
            outlook.ahead, camp, now_s
        ):
            return []
        camps = Tally((n.round, n.digest) for n in outlook.ahead)
        return sorted(outlook.ahead, key=lambda n: (-camps[n.round, n.digest], -n.round))

    def _outweighed(self, camp: list[Neighbour], own: int, now_s: float) -> bool:
        """Whether those in `camp` together weigh more than the `own` at our state."""
        return self._weight(camp, now_s) > self._own_weight(camp, own, now_s)

    def _weight(self, camp: list[Neighbour], now_s: float) -> tuple[bool, int, int]:
        """Of those who are together at another state than ours, to compare with `_own_weight`.

        A majority counts most, the silent included; then what was one since we parted, as others
        may have built on that (gossip does); then how many there are.
        """
        return (
            self._most(len(camp), now_s),
            max(n.firm * (n.firm > n.shared) for n in camp),
            len(camp),
        )

    def _own_weight(self, camp: list[Neighbour], own: int, now_s: float) -> tuple[bool, int, int]:
        here = self._here
        parted = max(n.shared for n in camp)
        return self._most(own, now_s), here.firm_round * (here.firm_round > parted), own

    def _most(self, count: int, now_s: float) -> bool:
        here = self._here
        return 2 * count > 1 + here.members.lately(here.group, now_s)

    def _fellow(self, neighbour: Neighbour) -> bool:
        """Whether its state was ours a round ago, and is ours or a round's way from it."""
        here = self._here
        if not neighbour.ready or neighbour.apart or neighbour.round < here.round - 1:
            return False
        if neighbour.round == here.round:
            return neighbour.digest == here.digest
        return neighbour.shared >= max(0, here.round - 1)

    def donors(self, now_s: float) -> list[Neighbour]:
        """Peers with the run's state: our group's first, then those with most history.

        Of equals each newcomer asks another first, so that a crowd does not queue at one door.
        """
        here = self._here
        return sorted(
            (n for n in here.members.everybody() if n.ready and not n.suspected and n.heard_s > 0),
            key=lambda n: (n.group != here.group, -n.round, lot(here.me, n.record.peer)),
        )

    def _avoid(self, donor: PeerId, now_s: float) -> None:
        """A transfer from it failed: others first, and twice as long each time."""
        if len(self._bad_donors) >= limits.KNOWN_PEERS_MAX:
            self._bad_donors.clear()
        _, wait_s = self._bad_donors.get(donor, (0.0, RETRY_S))
        self._bad_donors[donor] = (now_s + wait_s, min(2 * wait_s, DONOR_BACKOFF_S_MAX))

    def fetch_state(
        self, donors: list[Neighbour], now_s: float, *, step_back: bool = False
    ) -> list[Effect]:
        never = (0.0, 0.0)
        able = [d for d in donors if self._bad_donors.get(d.record.peer, never)[0] <= now_s]
        if not able:
            return []
        donor = able[0]
        until_s = now_s + max(STATE_FETCH_S, STATE_EXCHANGES * self._here.config.exchange_s)
        self._fetch = Attempt(donor.record.peer, until_s)
        parted = self._parted(donor)
        self._common = -1 if parted is None else parted
        return [FetchState(donor.record.peer, donor.round, donor.digest, step_back, parted)]

    def _parted(self, donor: Neighbour) -> int | None:
        """Since when we and those who hold the donor's state have histories of our own.

        None where all of them share our plan (then one of us has computed wrongly, and what we
        learned on top of that is not kept), or where we know no state that we had in common. The
        donor itself may be a fellow who healed a moment before us.
        """
        here = self._here
        latest = here.current or here.previous
        if not here.ready or latest is None:
            return None
        apart = [
            n.shared
            for n in here.members.in_group(here.group)
            if (n.round, n.digest) == (donor.round, donor.digest)
            and n.shared >= 0
            and n.record.peer not in latest.plan.peers
        ]
        if not apart and donor.agreed == here.round:
            # A fellow stood here with us and now stands elsewhere: it has heard of others already.
            apart = [
                n.shared
                for n in here.members.in_group(here.group)
                if n.shared >= 0 and n.record.peer not in latest.plan.peers
            ]
        return max(apart, default=None)

    def check_digests(self, now_s: float) -> list[Effect]:
        """Compare with everyone who stands at the same round; the minority heals."""
        here = self._here
        outlook = here.outlook(now_s)
        if outlook is self._compared or (here.current is not None and here.current.applying):
            return []
        same_round = [n for n in outlook.live if n.ready and n.round == here.round and n.digest]
        if not same_round:
            return []
        for n in same_round:
            if n.digest == here.digest:
                n.agreed, n.apart, n.jumped = here.round, False, False
                here.firm_round = max(here.firm_round, n.firm)
        tally = Tally([here.digest, *(n.digest for n in same_round)])
        if len(tally) == 1:
            self._compared = outlook  # nothing new to say until somebody stands elsewhere
            peers = tuple(sorted([here.me, *(n.record.peer for n in same_round)]))
            latest = here.previous
            expected = len(latest.plan.peers) if latest is not None else len(peers)
            if here.agreed < here.round and len(peers) >= expected:
                here.agreed = here.round
                return [Agreed(here.round, here.digest, peers)]
            return []
        if outlook.behind and now_s - here.applied_s < limits.DIGEST_WAIT_S:
            return []  # who is the majority shows when all have reported
        return self._heal(same_round, tally, now_s)

    def _heal(
        self, same_round: list[Neighbour], tally: Tally[Digest], now_s: float
    ) -> list[Effect]:
        here = self._here
        holders: dict[Digest, list[PeerId]] = {here.digest: [here.me]}
        for n in same_round:
            holders.setdefault(n.digest, []).append(n.record.peer)
        assert here.record is not None
        seats = [seat_of(n.record) for n in same_round] + [seat_of(here.record.record)]
        order = candidates(here.group, 0, seats)
        first = {d: min(order.index(p) for p in peers) for d, peers in holders.items()}
        if self._fetch is not None:
            return []
        camps = {d: [n for n in same_round if n.digest == d] for d in tally if d != here.digest}
        own = tally[here.digest]
        theirs = {d: (self._weight(camp, now_s), -first[d]) for d, camp in camps.items()}
        over = {
            d: weight for d, weight in theirs.items()
            if weight > (self._own_weight(camps[d], own, now_s), -first[here.digest])
        }  # fmt: skip
        if not over:
            return []
        winner = max(over, key=lambda d: over[d])
        donors = camps[winner]
        effects = self.fetch_state(donors, now_s)
        for effect in effects[:1]:
            if isinstance(effect, FetchState):
                effects.insert(0, Differed(here.round, here.digest, winner, effect.donor))
        return effects


def lot(asker: PeerId, donor: PeerId) -> bytes:
    """An order of donors that is each asker's own, and always the same."""
    return hashlib.sha256(f"{asker}\x00{donor}".encode()).digest()
