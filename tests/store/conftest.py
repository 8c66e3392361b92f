"""A store with an empty cache, and one device; where that is kept."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.store.rig import KIB, RAW, Sample, sample, store_settings
from veneer.store.link import LinkEstimate
from veneer.store.spanstore import SpanStore, open_store


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """A miss brings nothing along, or what comes would depend on how fast the machine is."""
    # A patch of its own, as tests undo theirs.
    with pytest.MonkeyPatch.context() as patch:
        if "neighbours" not in request.fixturenames:
            patch.setattr(LinkEstimate, "reach", (0, 0))
        yield


@pytest.fixture
def neighbours() -> None:
    """For tests of what a miss brings along."""


@pytest.fixture
def one() -> Sample:
    return sample([60 * KIB] * 10, codecs=(RAW,))


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SpanStore]:
    async with open_store(store_settings(tmp_path)) as store:
        yield store


@pytest.fixture
def directory(tmp_path: Path, one: Sample) -> Path:
    return tmp_path / "cache" / "devices" / one.device.key.hex
