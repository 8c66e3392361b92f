import pytest
from trio.testing import MockClock

from tests.clocks import patient_clock


@pytest.fixture
def jumping_clock() -> MockClock:
    return patient_clock()
