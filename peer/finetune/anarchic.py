"""Anarchic federated learning: who trains, how much and when is everybody's own business.

Worker i, whenever it likes, takes version mu of the parameters x, makes K_i local steps of length
eta_L of its own choice, and pushes the mean of its gradients, G_i = (x_mu - x_end) / (eta_L K_i),
which says nothing of K_i or eta_L any more. An aggregator moves x at every m-th arrival:

    AFA-CD:  x <- x - eta mean of the m that arrived
    AFA-CS:  x <- x - eta mean over all peers of the last that each one pushed

(Yang, Zhang, Khanduri and Liu, "Anarchic Federated Learning", ICML 2022, arXiv 2108.09875.) With CD
a peer counts as often as it comes: where arrivals are skewed the result is biased towards the busy.
CS remembers the last contribution of each and has no such bias; its table is the aggregator's only
memory, and can be handed to a successor (`pack`, `take_over`).

A push is signed by its worker, so that a successor need not believe its predecessor, and carries a
sequence number: sent again after an aggregator died it counts once. Updates stay as they came,
coded (8 bits per value); means are taken over the table in the order of peers, whatever order they
arrived in, so the successor's next step is the same to the last bit.

Shapes: N = values of the layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt

from protocols import schema
from protocols.errors import RemoteProtocolError
from protocols.identity import SIGNATURE_BYTES, Signer, verify
from protocols.schema import Exactly, Max
from protocols.types import PeerId
from tensorcodecs import DecodeError, Layout, get_codec, pack_vector, unpack_vector

Float32 = npt.NDArray[np.float32]

PEERS_MAX: Final = 64  # several groups' rosters; the table holds an update for each
UPDATE_BYTES_MAX: Final = 2**27  # 8 bits for each of the 40 M values of rank 16 on a 7 B model, x 3
ARRIVALS_MAX: Final = PEERS_MAX  # waiting for one step; more would be rounds again
STEPS_MAX: Final = 2**20  # local steps behind one push
_SIDE_BYTES: Final = 512  # a push without its update: body, signature, signer, framing
_BODY_BYTES_MAX: Final = 256
_CODEC: Final = get_codec("high")
_DOMAIN: Final = "anarchic-push"

Rule = Literal["cd", "cs"]


@dataclass(frozen=True, slots=True)
class PushBody:
    """What a worker signs."""

    run: Annotated[bytes, Exactly(32)]
    layout: Annotated[bytes, Exactly(32)]
    """The layout's digest."""
    sequence: int
    """Grows with each push of this worker."""
    version: int
    """Of the parameters it began from."""
    steps: Annotated[int, Max(STEPS_MAX)]
    """K: local steps made."""
    update: Annotated[bytes, Exactly(32)]
    """SHA-256 of the coded update."""


@dataclass(frozen=True, slots=True)
class Push:
    """A worker's contribution, as it travels and as it is kept."""

    signer: Annotated[str, Max(64)]
    body: Annotated[bytes, Max(_BODY_BYTES_MAX)]
    signature: Annotated[bytes, Exactly(SIGNATURE_BYTES)]
    update: Annotated[bytes, Max(UPDATE_BYTES_MAX)]
    """The coded mean gradient; b"" where it has been used and only its number is remembered."""


@dataclass(frozen=True, slots=True)
class Table:
    """An aggregator's memory, as it travels."""

    rule: Annotated[str, Max(2)]
    version: int
    arrivals: Annotated[int, Max(ARRIVALS_MAX)]
    """Since the last step."""
    heard: Annotated[tuple[Push, ...], Max(PEERS_MAX)]
    """Each peer's last push, by peer; with CD without its update."""
    waiting: Annotated[tuple[Push, ...], Max(ARRIVALS_MAX)]
    """With CD: those that the next step is made of."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """`sender`, authenticated by the transport, passed on a push: its own or another's."""

    sender: PeerId
    push: Push


@dataclass(frozen=True, slots=True)
class Gone:
    """`peer` left for good, or was banned: nothing of it counts any more."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Move:
    """x <- x - eta * direction_N, which makes it `version`."""

    version: int
    direction_N: Float32
    peers: tuple[PeerId, ...]
    """Whose contributions are in it, sorted; twice where one is in it twice."""


@dataclass(frozen=True, slots=True)
class TooOld:
    """`peer` began from a version that is too far behind: it should take the present one."""

    peer: PeerId
    version: int
    """The present one."""


def mean_gradient(start_N: Float32, end_N: Float32, lr: float, steps: int) -> Float32:
    """G = (start - end) / (lr steps), of plain local SGD.

    Raises:
        ValueError: no step, or a length that is not positive.
    """
    if steps < 1 or not 0.0 < lr < math.inf:
        raise ValueError(f"{steps} steps of length {lr}")
    return np.asarray((start_N - end_N) * np.float32(1.0 / (lr * steps)), np.float32)


def make_push(
    signer: Signer,
    run: bytes,
    layout: Layout,
    update_N: Float32,
    *,
    sequence: int,
    version: int,
    steps: int,
) -> Push:
    """A signed push of a mean gradient.

    Raises:
        EncodeError: a value that can't be sent.
        ValueError: the update is not the layout's, or no step was made.
    """
    if not 1 <= steps <= STEPS_MAX:
        raise ValueError(f"{steps} local steps")
    coded = pack_vector(update_N, layout, _CODEC)
    digest = hashlib.sha256(coded).digest()
    body = schema.pack(PushBody(run, layout.digest(), sequence, version, steps, digest))
    return Push(signer.peer_id, body, signer.sign(_DOMAIN, body), coded)


class Anarchic:
    """An aggregator of anarchic contributions. It makes a step at every `per_step`-th arrival.

    Bytes kept: at most (PEERS_MAX + per_step) updates, of a byte per value and a little.
    """

    deadline_s = math.inf
    """It waits for nobody: what it does depends on events alone."""

    def __init__(
        self,
        rule: Rule,
        run: bytes,
        layout: Layout,
        *,
        per_step: int,
        versions_behind_max: int,
        memory_versions: int,
        version: int = 0,
    ) -> None:
        """`per_step`: m. `versions_behind_max`: older pushes are refused. `memory_versions`: after
        so many versions without a push a peer is forgotten, with what it had pushed.

        Raises:
            ValueError: settings without meaning, or a layout whose updates are too large to keep.
        """
        if rule not in ("cd", "cs"):
            raise ValueError(f"no rule {rule!r}: cd or cs")
        if not 1 <= per_step <= ARRIVALS_MAX:
            raise ValueError(f"a step every {per_step} arrivals, not 1 to {ARRIVALS_MAX}")
        # Who is forgotten could push what it had pushed before: that must be too old by then.
        if not 0 <= versions_behind_max <= memory_versions:
            raise ValueError(
                f"forgotten after {memory_versions} versions, yet {versions_behind_max} may be late"
            )
        self._update_bytes_max = _container_bytes_max(layout)
        if self._update_bytes_max > UPDATE_BYTES_MAX or layout.numel == 0:
            raise ValueError(f"{layout.numel} values are no update that a table can hold")
        self.rule: Rule = rule
        self.version = version
        self._run = run
        self._layout = layout
        self._per_step = per_step
        self._behind_max = versions_behind_max
        self._memory = memory_versions
        self._arrivals = 0
        self._heard: dict[PeerId, tuple[PushBody, Push]] = {}
        self._waiting: list[tuple[PushBody, Push]] = []

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """Whom it remembers, sorted."""
        return tuple(sorted(self._heard))

    @property
    def state_bytes_max(self) -> int:
        """The size of the largest `pack`, to bound a transfer before it starts."""
        return (PEERS_MAX + self._per_step) * (self._update_bytes_max + _SIDE_BYTES) + _SIDE_BYTES

    def handle(self, event: Pushed | Gone, now_s: float) -> list[Move | TooOld]:
        """Take a contribution in, or forget a peer.

        One that was here before changes nothing.

        Raises:
            RemoteProtocolError: a push that is not signed by its signer, is of another run or
                layout, comes from the future, says nothing that can be read, or finds no room.
        """
        match event:
            case Pushed(sender, push):
                return self._take(sender, push)
            case Gone(peer):
                self._forget([peer])
                return []

    def _take(self, sender: PeerId, push: Push) -> list[Move | TooOld]:
        body = self._checked(sender, push, needed=True)
        peer = PeerId(push.signer)
        if body.version > self.version:
            raise RemoteProtocolError(
                sender, f"a push of {peer} from version {body.version}, now is {self.version}"
            )
        known = self._heard.get(peer)
        if known is not None and body.sequence <= known[0].sequence:
            return []
        if body.version < self.version - self._behind_max:
            return [TooOld(peer, self.version)]
        if known is None and len(self._heard) >= PEERS_MAX:
            raise RemoteProtocolError(
                sender, f"{PEERS_MAX} peers are remembered, no room for {peer}"
            )
        if self.rule == "cs":
            self._heard[peer] = body, push
        else:
            self._heard[peer] = body, Push(push.signer, push.body, push.signature, b"")
            self._waiting.append((body, push))
        self._arrivals += 1
        return [self._step()] if self._arrivals >= self._per_step else []

    def _step(self) -> Move:
        used = list(self._heard.values()) if self.rule == "cs" else self._waiting
        used = sorted(used, key=lambda entry: (entry[1].signer, entry[0].sequence))
        sum_N = np.zeros(self._layout.numel)
        for _, push in used:
            sum_N += unpack_vector(push.update, self._layout)
        sum_N /= len(used)
        self.version += 1
        self._arrivals = 0
        self._waiting = []
        self._forget(
            peer
            for peer, (body, _) in self._heard.items()
            if body.version < self.version - self._memory
        )
        peers = tuple(PeerId(push.signer) for _, push in used)
        return Move(self.version, sum_N.astype(np.float32), peers)

    def _forget(self, peers: Iterable[PeerId]) -> None:
        gone = set(peers)
        self._heard = {peer: held for peer, held in self._heard.items() if peer not in gone}
        if self.rule == "cd":
            self._waiting = [held for held in self._waiting if held[1].signer not in gone]
            self._arrivals = len(self._waiting)
        elif not self._heard:
            self._arrivals = 0  # a step needs somebody

    # ── handed over ──────────────────────────────────────────────────────────────────────
    def pack(self) -> bytes:
        """Everything a successor needs besides the parameters at `version`."""
        heard = tuple(self._heard[peer][1] for peer in sorted(self._heard))
        waiting = tuple(push for _, push in self._waiting)
        return schema.pack(Table(self.rule, self.version, self._arrivals, heard, waiting))

    def take_over(self, sender: PeerId, data: bytes) -> None:
        """Become what the aggregator was that packed `data`; `sender` passed it to us.

        Every push in it is verified. What can't be: that none is missing, and that the version is
        right; hold it against the parameters' own.

        Raises:
            RemoteProtocolError: not such a table, one of another rule, or something in it that
                `handle` would have refused. Nothing has changed then.
        """
        if len(data) > self.state_bytes_max:
            raise RemoteProtocolError(sender, f"a table of {len(data)} bytes")
        try:
            table = schema.unpack(Table, data)
        except schema.SchemaError as error:
            raise RemoteProtocolError(sender, str(error)) from None
        if table.rule != self.rule:
            raise RemoteProtocolError(sender, f"a table of rule {table.rule[:2]!r}")
        heard: dict[PeerId, tuple[PushBody, Push]] = {}
        for push in table.heard:
            body = self._checked(sender, push, needed=self.rule == "cs")
            heard[PeerId(push.signer)] = body, push
        waiting = [(self._checked(sender, push, needed=True), push) for push in table.waiting]
        self._check_table(sender, table, heard, waiting)
        self.version = table.version
        self._arrivals = table.arrivals
        self._heard = heard
        self._waiting = waiting

    def _check_table(
        self,
        sender: PeerId,
        table: Table,
        heard: dict[PeerId, tuple[PushBody, Push]],
        waiting: list[tuple[PushBody, Push]],
    ) -> None:
        """Raises RemoteProtocolError: parts that can't have come together."""
        numbered = {(push.signer, body.sequence) for body, push in waiting}
        if len(heard) != len(table.heard) or len(numbered) != len(waiting):
            raise RemoteProtocolError(sender, "a table that holds something twice")
        if table.arrivals >= self._per_step:
            raise RemoteProtocolError(sender, f"{table.arrivals} arrivals and no step")
        if self.rule == "cs" and (waiting or (table.arrivals and not heard)):
            raise RemoteProtocolError(sender, "a table of cs with arrivals of nobody")
        if self.rule == "cd" and table.arrivals != len(waiting):
            raise RemoteProtocolError(sender, f"{table.arrivals} arrivals, {len(waiting)} waiting")
        oldest = table.version - self._memory
        for body, push in [*heard.values(), *waiting]:
            if not oldest <= body.version <= table.version:
                raise RemoteProtocolError(
                    sender, f"version {body.version} in a table of version {table.version}"
                )
            last = heard.get(PeerId(push.signer))
            if last is None or body.sequence > last[0].sequence:
                raise RemoteProtocolError(sender, "a push that waits and was never heard of")

    def _checked(self, sender: PeerId, push: Push, *, needed: bool) -> PushBody:
        """The body of a push that is all right. `needed`: whether it must bring its update."""

        def refused(what: str) -> RemoteProtocolError:
            return RemoteProtocolError(sender, f"a push of {push.signer[:64]}: {what}")

        if not verify(PeerId(push.signer), _DOMAIN, push.body, push.signature):
            raise refused("a wrong signature")
        try:
            body = schema.unpack(PushBody, push.body)
        except schema.SchemaError as error:
            raise refused(str(error)) from None
        if body.run != self._run or body.layout != self._layout.digest():
            raise refused("another run or another layout")
        if body.steps < 1:
            raise refused("no local step")
        if not needed:
            if push.update:
                raise refused("an update where none belongs")
            return body
        if len(push.update) > self._update_bytes_max:
            raise refused(f"an update of {len(push.update)} bytes")
        if hashlib.sha256(push.update).digest() != body.update:
            raise refused("another update than was signed")
        try:
            unpack_vector(push.update, self._layout)
        except DecodeError as error:
            raise refused(str(error)) from None
        return body


def _container_bytes_max(layout: Layout) -> int:
    """The largest coded update of a layout: its frames, their offsets and the head."""
    frames = sum(_CODEC.bytes_max(size) for size in layout.unit_sizes(0, layout.units))
    return 64 + 8 * layout.units + frames
