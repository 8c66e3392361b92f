import pytest
from trio.testing import MockClock


@pytest.fixture
def jumping_clock() -> MockClock:
    """Jumps to the next deadline when nothing happens; loopback may take a moment on a busy machine."""
    return MockClock(autojump_threshold=0.02)
