"""Fixtures for the transports: both event loops, and no blocking of either."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import uvloop
from blockbuster import BlockBuster, blockbuster_ctx


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
def no_blocking() -> Iterator[BlockBuster]:
    """The event loop may not be blocked."""
    with blockbuster_ctx() as blockbuster:
        yield blockbuster
