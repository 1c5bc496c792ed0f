"""What the owner of a peer decides; everything else is the run's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peer.errors import UsageError
from peer.manifest import Manifest
from peer.manifest_toml import Content
from peer.net.budget import parse_rate
from peer.train.means import Wish
from protocols import limits


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """Resolved once, passed whole. Every field has a default that works on a laptop."""

    home: Path | None = None
    """Where identities, checkpoints and logs live; None: the user's data folder."""
    seat: str | None = None
    """Which identity in there; None: the lowest one that no other peer uses."""
    via: tuple[str, ...] = ()
    """Addresses of peers or bootstrap nodes; remembered for the next start."""
    run: str | None = None
    """Id of the run to join (or its first characters); None: the one that is found."""
    manifest: Manifest | None = None
    """A run to start rather than to join."""
    files: Mapping[str, Content] = field(default_factory=dict)
    """The new run's assets: name in the manifest -> its bytes, or a file on this machine."""
    data: tuple[Path, ...] = ()
    """This peer's own training files, where the run leaves data to each peer."""
    site: str = ""
    """Peers with the same label form a group, whatever the network says."""
    host: str = "0.0.0.0"
    """Address to listen on."""
    port: int = 0
    """Port to listen on; 0: any free one, kept over restarts."""
    lane: bool = True
    """Whether bulk may take a TLS connection of its own where peers reach each other directly."""
    lane_port: int = 0
    """Port to listen on for these; 0: any free one, kept over restarts."""
    relay: bool = False
    """Forward for peers that can't be reached directly."""
    announce: tuple[str, ...] = ()
    """Addresses to tell others, if they differ from what this machine sees (a forwarded port)."""
    upload: str | None = None
    """Upload budget such as `20mbit`; None: as fast as the line goes."""
    device: str | None = None
    """Where to train: cpu, cuda, cuda:1; None: a GPU if there is one."""
    method: str = "auto"
    """hybrid runs: what this peer trains (`peer.train.means`); auto: what it can afford."""
    threads: int | None = None
    """CPU cores that training may use; None: torch's choice."""
    metrics_port: int | None = None
    """Serve /metrics and /healthz on this local port (0: any); None: don't."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port must be 0 to 65535 (got {self.port})")
        if not 0 <= self.lane_port <= 65535:
            raise UsageError(f"--lane-port must be 0 to 65535 (got {self.lane_port})")
        if self.lane_port and self.lane_port == self.port:
            raise UsageError("--lane-port must be another one than --port")
        if len(self.site) > limits.NAME_CHARS_MAX - len("site:") or any(
            not (c.isalnum() or c in "-_.") for c in self.site
        ):
            raise UsageError(f"--site must be letters, digits, - _ or . (got {self.site[:80]!r})")
        if self.threads is not None and not 1 <= self.threads <= 4096:
            raise UsageError(f"--threads must be 1 to 4096 (got {self.threads})")
        Wish.parse(self.method)
        if self.upload is not None:
            parse_rate(self.upload)

    @property
    def upload_bps(self) -> float | None:
        """Upload budget in bits per second."""
        return None if self.upload is None else parse_rate(self.upload)
