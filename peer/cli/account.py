"""`peer ledger`: what became of the run's blocks, by the logs of this machine's peers.

The log has the group's account after every round, and who trained which blocks in it. So the sums
can be gone over again, and the accounts of several peers held against each other.
"""

from __future__ import annotations

import json
import sys
from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from peer.errors import StorageError
from peer.home import SeatInfo, seats
from peer.observe import words
from protocols.ranges import Ranges

LINE_BYTES_MAX: Final = 4 * 2**20  # a round of 16 members with all their ranges is 40 KiB
_TOTALS: Final = (
    "trained", "repeated", "unasked", "reissued", "lost", "elsewhere", "in_flight", "held",
    "waiting", "floor",
)  # fmt: skip


@dataclass(slots=True)
class Account:
    """One seat's history in one group of one run."""

    seat: str
    run: str
    group: str
    rounds: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Round -> the last `BlocksCounted` of it: a peer that stepped back counts again."""
    reissued: Tally[str] = field(default_factory=Tally)
    """Why -> blocks."""

    @property
    def last(self) -> dict[str, Any]:
        return self.rounds[max(self.rounds)]

    def by_peer(self) -> Tally[str]:
        """Blocks that each peer trained, as far as this log goes back."""
        found: Tally[str] = Tally()
        for event in self.rounds.values():
            for peer, ranges in event["by"].items():
                found[peer] += sum(b - a for a, b in ranges)
        return found

    def faults(self) -> list[str]:
        """What does not add up."""
        found: list[str] = []
        seen = Ranges()
        for number in sorted(self.rounds):
            event, before = self.rounds[number], self.rounds.get(number - 1)
            pieces = [tuple(r) for ranges in event["by"].values() for r in ranges]
            new = sum(b - a for a, b in pieces)
            if before is not None and event["trained"] != before["trained"] + new:
                found.append(
                    f"round {number}: {event['trained']} trained in all, not"
                    f" {before['trained']} + {new}"
                )
            if sum(seen.add(a, b) for a, b in pieces) != new:
                found.append(f"round {number}: counts a block as new that was trained before")
            settled = event["trained"] + event["lost"] + event["elsewhere"]
            if settled < event["floor"]:
                found.append(f"round {number}: {settled} settled, {event['floor']} needed")
        return found


def ledger(home: Path | None, seat: str | None, as_json: bool) -> int:
    """Print the account of every run in the logs; 1 if something does not add up.

    Raises:
        StorageError: there is no log with an account.
    """
    accounts = [
        account
        for info in seats(home)
        if seat in (None, info.name)
        for account in read_accounts(info)
    ]
    if not accounts:
        raise StorageError(
            "no log here has an account of blocks yet; it begins with the first round of"
            " `python -m peer join`"
        )
    faults = {id(a): a.faults() for a in accounts}
    apart = disagreements(accounts)
    if as_json:
        sys.stdout.write(
            json.dumps(
                {
                    "accounts": [
                        {
                            "seat": a.seat, "run": a.run, "group": a.group,
                            "round": max(a.rounds), "rounds": len(a.rounds),
                            **{name: a.last[name] for name in _TOTALS},
                            "by_peer": dict(a.by_peer()), "reissued_because": dict(a.reissued),
                            "faults": faults[id(a)],
                        }
                        for a in accounts
                    ],
                    "disagreements": apart,
                },
                indent=1,
            ) + "\n"
        )  # fmt: skip
    else:
        for account in accounts:
            _show(account, faults[id(account)])
        for text in apart:
            sys.stdout.write(f"  peers differ: {text}\n")
    return int(bool(apart) or any(faults.values()))


def read_accounts(info: SeatInfo) -> list[Account]:
    """By run and group, in the order of their first rounds."""
    found: dict[tuple[str, str], Account] = {}
    run = ""
    log = info.folder / "log.jsonl"
    for event in (*_events(log.with_name(log.name + ".1")), *_events(log)):
        kind = event.get("event")
        try:
            if kind == "Started":
                run = str(event["run"])
            elif kind == "BlocksCounted":
                key = (run, str(event["group"]))
                account = found.setdefault(key, Account(info.name, *key))
                account.rounds[int(event["round"])] = event
                if any(type(event[name]) is not int for name in (*_TOTALS, "round")):
                    raise ValueError("totals that are no numbers")
            elif kind == "BlocksReissued" and found:
                latest = next(reversed(found.values()))
                latest.reissued[str(event["reason"])] += sum(b - a for a, b in event["blocks"])
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"{log} has a line that is no event of this version ({error}); move it away"
            ) from None
    return list(found.values())


def disagreements(accounts: list[Account]) -> list[str]:
    """Rounds after which two peers of a group had different totals."""
    found = []
    for i, one in enumerate(accounts):
        for other in accounts[:i]:
            if (one.run, one.group) != (other.run, other.group):
                continue
            for number in sorted(one.rounds.keys() & other.rounds.keys()):
                a, b = one.rounds[number], other.rounds[number]
                if any(a[name] != b[name] for name in _TOTALS):
                    found.append(
                        f"{one.seat} and {other.seat} after round {number}:"
                        f" {words.account(a)} against {words.account(b)}"
                    )
                    break
    return found


def _events(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            while line := file.readline(LINE_BYTES_MAX):
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # a killed process leaves half a line
                if isinstance(event, dict):
                    yield event
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from None


def _show(account: Account, faults: list[str]) -> None:
    last = account.last
    out = [
        (
            f"{account.seat}: run {account.run[:12]}, {words.group(account.group)}, after round"
            f" {last['round']} ({words.plural(len(account.rounds), 'round')} in the log)"
        ),
        f"  blocks     {words.account(last)}",
        f"  held       {last['held']:,}; {last['waiting']:,} free before the furthest of them",
    ]
    for peer, count in account.by_peer().most_common():
        out.append(f"  {words.short(peer):<10} trained {words.plural(count, 'block')}")
    out += [
        f"  re-issued  {words.plural(count, 'block')}: {words.clean(reason)}"
        for reason, count in account.reissued.most_common()
    ]
    out += [f"  WRONG      {words.clean(fault)}" for fault in faults]
    out += [] if faults else ["  the sums add up"]
    sys.stdout.write("\n".join(out) + "\n")
