"""A store with an empty cache, and one device; where that is kept."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.store.rig import KIB, RAW, Sample, sample, store_settings
from veneer.store.spanstore import SpanStore, open_store


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
