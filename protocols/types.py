"""The words that every layer shares."""

from __future__ import annotations

from typing import NewType

PeerId = NewType("PeerId", str)
"""Base58 libp2p id of an Ed25519 key (`12D3KooW...`); it embeds the public key."""

RunId = NewType("RunId", str)
"""64 hex characters: SHA-256 of the run's canonical manifest bytes."""

GroupName = NewType("GroupName", str)
"""What a group calls itself: `site:LABEL`, or `near:FOUNDER` for a measured neighbourhood."""

Digest = NewType("Digest", bytes)
"""32 bytes: SHA-256 of a state or of an outcome's content."""
