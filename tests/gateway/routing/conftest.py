"""The gateway's own fixtures, over models that each test chooses."""

import pytest

from tests.gateway.conftest import open_gateway

__all__ = ["open_gateway"]


@pytest.fixture
def backend() -> None:
    """No model but those of the test."""
