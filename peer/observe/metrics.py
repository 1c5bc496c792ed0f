"""Prometheus metrics, and the small web server for `/metrics` and `/healthz`.

The bootstrap node serves its own registry with the same `serve_http`.
"""

from __future__ import annotations

import errno
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from peer.errors import NetworkError
from peer.net.lane_counters import CARRIERS, FAILURES, REFUSALS, LaneCounters
from peer.observe import events as ev

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

REQUEST_BYTES_MAX: Final = 4096  # nobody has anything to tell these two pages
CLOSE_TIMEOUT_S: Final = 0.5


class Metrics:
    """A listener that keeps a registry of its own. All names begin with `murmuration_`."""

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = registry or CollectorRegistry()
        self._clock = clock
        self._saved_s: float | None = None
        self._round = self._gauge("round", "Rounds of history that this peer's state holds")
        self._epoch = self._gauge("epoch", "Epoch of the group's plan")
        self._loss = self._gauge("loss", "Training loss, nats per token")
        self._validation = self._gauge("validation_loss", "Validation loss, nats per token")
        self._tokens = self._gauge("tokens_per_second", "Training speed of this peer")
        self._members = self._gauge("members", "Live members of the group, this peer included")
        self._waited = self._gauge("waited_ratio", "Share of time that training waited")
        self._coverage = self._gauge("coverage_ratio", "Least coverage of a span, last round")
        age = self._gauge("checkpoint_age_seconds", "Since the last checkpoint; NaN before it")
        age.set_function(self._checkpoint_age_s)
        self._up = self._counter("bytes_up", "Bytes sent to peers")
        self._down = self._counter("bytes_down", "Bytes received from peers")
        self._rounds = self._counter("rounds", "Rounds whose outcome was applied")
        self._left_out = self._counter("rounds_left_out", "Rounds without this peer's work")
        self._refused = self._counter("refused", "Messages of peers that broke the rules")
        self._suspected = self._counter("suspected", "Members that stopped answering")
        self._differed = self._counter("digests_differed", "Rounds after which we had to heal")
        self._mixes = self._counter("mixes", "Mixes with other groups, done on both sides")
        self._mixes_lost = self._counter("mixes_lost", "Mixes of which the other side was lost")
        self._restarts = self._counter("daemon_restarts", "Deaths of the network daemon")
        self._blocks = {
            name: self._gauge(f"blocks_{name}", text)
            for name, text in (
                ("trained", "Blocks of data in the group's state, each counted once"),
                ("in_flight", "Blocks begun or trained, and not wholly inside yet"),
                ("reissued", "Blocks taken back from peers that went"),
                ("repeated", "Blocks trained more than once"),
                ("lost", "Blocks that nobody accounts for"),
            )
        }
        self._bytes = (0, 0)
        self.lanes = LaneCounters()
        """Looked at whenever somebody asks for the metrics; the transport's own, if it has any."""
        self.method: Callable[[], Mapping[str, Any]] = dict
        """What the method tells of itself, likewise."""
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What the bulk lane and the method count by themselves, as a prometheus_client
        Collector."""
        lanes, method = self.lanes, self.method()
        for name, text, key in (
            ("mean_tail", "Norm of what the run's rank cut off the last mean", "tail"),
            ("work_lost", "Norm of own work that own rank could not hold", "lost"),
        ):
            yield GaugeMetricFamily(f"murmuration_{name}", text, value=method.get(key, 0.0))

        def family(name: str, text: str, label: str, counts: Iterable[tuple[str, int]]) -> Metric:
            found = CounterMetricFamily(f"murmuration_{name}", text, labels=[label])
            for kind, count in counts:
                found.add_metric([kind], count)
            return found

        yield family(
            "streams_opened", "Streams opened here, by who carries them", "carrier",
            ((carrier, lanes.opened[carrier]) for carrier in CARRIERS),
        )  # fmt: skip
        yield family(
            "lane_failures", "Bulk lanes that did not come about, or broke", "kind",
            ((kind, lanes.failed[kind]) for kind in FAILURES),
        )  # fmt: skip
        yield family(
            "lane_refused", "Bulk lanes of others that were turned away", "kind",
            ((kind, lanes.refused[kind]) for kind in REFUSALS),
        )  # fmt: skip
        for name, text, value in (
            ("lane_bytes_up", "Bytes sent over bulk lanes", lanes.bytes_up),
            ("lane_bytes_down", "Bytes received over bulk lanes", lanes.bytes_down),
        ):
            yield CounterMetricFamily(f"murmuration_{name}", text, value=value)
        yield GaugeMetricFamily(
            "murmuration_lane_connections", "Bulk lanes open now", value=lanes.connections
        )

    def __call__(self, event: ev.Event) -> None:
        match event:
            case ev.Progress():
                self._progress(event)
            case ev.RoundFinished():
                self._rounds.inc()
                self._left_out.inc(event.included <= 0)
                self._coverage.set(min((span.coverage for span in event.spans), default=0.0))
                if event.validation_loss is not None:
                    self._validation.set(event.validation_loss)
            case ev.BlocksCounted():
                for name, gauge in self._blocks.items():
                    gauge.set(getattr(event, name))
            case ev.GroupChanged():
                self._members.set(len(event.members))
            case ev.PeerRefused():
                self._refused.inc()
            case ev.MemberSuspected():
                self._suspected.inc()
            case ev.DigestDiffered():
                self._differed.inc()
            case ev.MixSettled() | ev.MixReturned():
                self._mixes.inc()
            case ev.MixLost():
                self._mixes_lost.inc()
            case ev.DaemonRestarted():
                self._restarts.inc()
            case ev.CheckpointSaved():
                self._saved_s = self._clock()

    def _progress(self, event: ev.Progress) -> None:
        self._round.set(event.round)
        self._epoch.set(event.epoch)
        self._loss.set(event.loss)
        self._tokens.set(event.tokens_per_s)
        self._members.set(len(event.members))
        self._waited.set(event.waited_share)
        up, down = self._bytes
        self._up.inc(max(0, event.bytes_up - up))
        self._down.inc(max(0, event.bytes_down - down))
        self._bytes = (event.bytes_up, event.bytes_down)

    def _checkpoint_age_s(self) -> float:
        return float("nan") if self._saved_s is None else self._clock() - self._saved_s

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"murmuration_{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"murmuration_{name}", text, registry=self.registry)


@asynccontextmanager
async def serve_http(
    registry: CollectorRegistry,
    health: Callable[[], dict[str, Any]],
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[int]:
    """Serve `/metrics` and `/healthz` for the block's length; yields the port (0 = any free).

    `/healthz` is `health()` as JSON, with status 503 where it holds `"ok": False`.

    Raises:
        NetworkError: the port is taken, or not ours to take.
    """

    async def metrics(request: web.Request) -> web.Response:
        body = generate_latest(registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(request: web.Request) -> web.Response:
        facts = health()
        status = 503 if facts.get("ok") is False else 200
        text = json.dumps(facts, default=str)
        return web.Response(text=text, content_type="application/json", status=status)

    app = web.Application(client_max_size=REQUEST_BYTES_MAX)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/healthz", healthz)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_TIMEOUT_S)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "is taken" if taken else f"can't be had ({error.strerror or error})"
            raise NetworkError(
                f"port {port} on {host} {why}; choose another with --metrics-port"
            ) from error
        bound: int = runner.addresses[0][1]
        yield bound
    finally:
        await runner.cleanup()
