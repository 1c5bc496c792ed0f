"""Listeners to the peer's typed events: console, JSONL log, Prometheus metrics."""
