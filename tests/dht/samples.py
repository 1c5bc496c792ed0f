"""Records, manifests and keys for the directory's tests."""

from __future__ import annotations

import hashlib
import time

from protocols.identity import Signer
from protocols.records import PeerRecord, sign_record
from protocols.types import GroupName, PeerId, RunId

MANIFEST = b"a manifest"
RUN = RunId(hashlib.sha256(MANIFEST).hexdigest())
OTHER_RUN = RunId("0" * 64)


def signer(name: str) -> Signer:
    return Signer(hashlib.sha256(name.encode()).digest())


def record(
    owner: Signer,
    *,
    run: RunId = RUN,
    peer: PeerId | None = None,
    issued_s: float | None = None,
    life_s: float = 90.0,
    group: str = "",
) -> PeerRecord:
    issued_ms = round((time.time() if issued_s is None else issued_s) * 1000)
    return PeerRecord(
        peer=peer or owner.peer_id,
        run=run,
        group=GroupName(group),
        site="",
        addresses=(),
        upload_kbps=1000,
        reachable=True,
        round=0,
        founded_ms=issued_ms,
        issued_ms=issued_ms,
        expires_ms=issued_ms + round(life_s * 1000),
    )


def signed(owner: Signer, **fields: object) -> bytes:
    return sign_record(owner, record(owner, **fields))  # type: ignore[arg-type]
