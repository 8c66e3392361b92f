"""The store and the registry client together, over real sockets that misbehave."""

import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests.registry.servers import repository_at
from tests.store.rig import KIB, Sample, sample, store_settings
from veneer.errors import IntegrityError, Unavailable
from veneer.source.base import BlobSource
from veneer.store.spanstore import AttachedDevice, SpanStore, open_store
from veneer.testing.actions import FlipBit, Reset, Truncate
from veneer.testing.registry import ScriptedRegistry, scripted_registry
from veneer.transport import Transport

pytestmark = pytest.mark.network


@dataclass
class Rig:
    one: Sample
    registry: ScriptedRegistry
    source: BlobSource
    store: SpanStore
    attached: AttachedDevice


@pytest.fixture
def deadline_s() -> float:
    """Of one read; longer than any takes that is to succeed, on a busy machine too."""
    return 30


@pytest.fixture
async def rig(tmp_path: Path, deadline_s: float) -> AsyncIterator[Rig]:
    one = sample([100 * KIB] * 20)
    settings = store_settings(tmp_path, deadline_s=deadline_s)
    async with (
        scripted_registry(tmp_path / "registry") as registry,
        Transport(settings) as transport,
        open_store(settings) as store,
    ):
        repository = repository_at(registry.host, "team/app", transport, settings)
        await repository.push_blob(one.device.blob, lambda: io.BytesIO(one.blob))
        source = repository.blob(one.device.blob)
        yield Rig(one, registry, source, store, store.attach(one.device, source))


async def test_a_flipped_bit_on_the_wire_is_fetched_again(rig: Rig) -> None:
    span = rig.one.device.spans[3]
    rule = rig.registry.faults.add(FlipBit(span.stored_offset + 77), path="/blobs/", count=2)
    assert await rig.store.read(rig.attached, 0, 500 * KIB) == rig.one.plain[: 500 * KIB]
    assert rule.hits == rig.store.stats.verify_failures == 2


async def test_a_flipped_bit_in_the_registry_is_an_error(rig: Rig) -> None:
    span = rig.one.device.spans[3]
    rig.registry.faults.add(FlipBit(span.stored_offset + 77), path="/blobs/", count=None)
    with pytest.raises(IntegrityError, match=span.digest.hex()):
        await rig.store.read(rig.attached, 0, 500 * KIB)
    assert await rig.store.read(rig.attached, 0, 300 * KIB) == rig.one.plain[: 300 * KIB]


async def test_resets_and_truncations_on_the_way_cost_nothing_but_time(rig: Rig) -> None:
    for action in (Reset(after=1000), Truncate(after=50_000)):
        rig.registry.faults.add(action, path="/blobs/", count=1)
    assert await rig.store.read(rig.attached, 0, rig.attached.size) == rig.one.plain


@pytest.mark.parametrize("deadline_s", [3])
async def test_without_the_registry_cached_reads_go_on_others_fail_in_time_and_work_when_it_is_back(
    rig: Rig,
) -> None:
    await rig.store.read(rig.attached, 0, 100)
    async with rig.registry.down():
        assert rig.store.cached(rig.attached, 0, 100 * KIB) == rig.one.plain[: 100 * KIB]
        with trio.fail_after(30), pytest.raises(Unavailable) as caught:
            await rig.store.read(rig.attached, 1500 * KIB, 100)
        assert rig.registry.host in caught.value.message
    assert await rig.store.read(rig.attached, 1500 * KIB, 100) == rig.one.plain[1500 * KIB :][:100]
