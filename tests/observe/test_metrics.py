"""Metrics: what Prometheus reads, over HTTP, on a port of the owner's choice."""

from __future__ import annotations

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from peer.errors import NetworkError
from peer.observe.events import PeerRefused
from peer.observe.hub import Hub
from peer.observe.metrics import Metrics, serve_http
from tests.observe.story import BOB, LIFE, PEERS, finished, progress


def value(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(f"murmuration_{name}")


def test_a_life_in_numbers() -> None:
    now_s = 100.0
    metrics = Metrics(clock=lambda: now_s)
    for event in LIFE:
        metrics(event)
    now_s = 130.0
    for name, wanted in {
        "round": 41, "epoch": 3, "loss": 2.31, "validation_loss": 2.402, "members": 3,
        "tokens_per_second": 1240, "waited_ratio": 0.012, "coverage_ratio": 0.66,
        "bytes_up_total": 1000, "bytes_down_total": 2000, "rounds_total": 1,
        "rounds_left_out_total": 0, "refused_total": 1, "suspected_total": 1,
        "digests_differed_total": 1, "daemon_restarts_total": 1, "checkpoint_age_seconds": 30,
    }.items():  # fmt: skip
        assert value(metrics, name) == pytest.approx(wanted), name


def test_bytes_only_grow_and_rounds_without_us_are_counted() -> None:
    metrics = Metrics()
    for total in (10, 25, 25):
        metrics(progress(bytes_up=total, bytes_down=0))
    metrics(finished(included=0.0))
    assert value(metrics, "bytes_up_total") == 25
    assert value(metrics, "rounds_left_out_total") == 1


def test_a_stranger_adds_no_series() -> None:
    metrics = Metrics()
    metrics(PeerRefused(PEERS[0], "junk"))
    before = len(list(metrics.registry.collect()))
    for number in range(100):
        metrics(PeerRefused(f"{BOB}{number}", "junk"))
    assert len(list(metrics.registry.collect())) == before


async def test_metrics_and_health_are_served() -> None:
    hub = Hub()
    metrics = Metrics()
    hub.listen(metrics)
    hub.emit(progress(round=7))
    health = {"ok": True, "round": 7}
    async with (
        serve_http(metrics.registry, lambda: health) as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http,
    ):
        async with http.get("/metrics") as page:
            assert page.headers["Content-Type"].startswith("text/plain; version=")
            assert "murmuration_round 7.0" in await page.text()
        async with http.get("/healthz") as page:
            assert (page.status, await page.json()) == (200, health)
        metrics.method = lambda: {"does": "LoRA", "tail": 0.5}
        async with http.get("/metrics") as page:
            text = await page.text()
            assert "murmuration_mean_tail 0.5" in text
            assert "murmuration_work_lost 0.0" in text
        health["ok"] = False
        async with http.get("/healthz") as page:
            assert page.status == 503
        async with http.get("/else") as page:
            assert page.status == 404


async def test_a_taken_port_is_said_with_the_next_step() -> None:
    registry = CollectorRegistry()
    async with serve_http(registry, dict) as port:
        with pytest.raises(NetworkError, match=f"port {port} .* is taken; choose another"):
            async with serve_http(registry, dict, port=port):
                pass
    async with serve_http(registry, dict, port=port) as again:
        assert again == port
