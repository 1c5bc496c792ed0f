"""The laboratory's own tests need root, a TUN device, `ip` and `cc`; without, they say so."""

from __future__ import annotations

import pytest

from tests.netlab import missing


@pytest.fixture(scope="session")
def machine() -> None:
    """For every test that builds a laboratory."""
    lack = missing()
    if lack is not None:
        pytest.skip(lack)
