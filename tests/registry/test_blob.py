"""Ranges and streams of blobs through everything that networks, registries and stores do to them."""

import io
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.registry.servers import repository_at
from tests.transport.settings import settings_in
from tests.transport.wire import Seen, Wire, serve
from veneer.errors import IntegrityError, NotFound, RateLimited, RegistryError, Unauthorized, Unavailable
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER
from veneer.registry.blob import SKIP_LIMIT
from veneer.registry.client import RegistryRepository
from veneer.settings import Settings
from veneer.source.base import BlobSource
from veneer.testing.actions import (
    Action,
    Delay,
    IgnoreRange,
    Rate,
    Reset,
    SetHeader,
    Stall,
    Status,
    Truncate,
    WrongRange,
    expired_xml,
    rate_limited,
)
from veneer.testing.registry import ObjectStore, ScriptedRegistry, scripted_registry
from veneer.transport import Transport

DATA = os.urandom(2 << 20)
#: A range in the middle of DATA.
START, LENGTH = 300_000, 1 << 20
WANTED = DATA[START : START + LENGTH]


async def push(repository: RegistryRepository, data: bytes = DATA) -> BlobSource:
    descriptor = Descriptor(OCI_LAYER, Digest.of(data), len(data))
    await repository.push_blob(descriptor, lambda: io.BytesIO(data))
    return repository.blob(descriptor)


@pytest.fixture
async def blob(repository: RegistryRepository) -> BlobSource:
    return await push(repository)


async def streamed(source: BlobSource, offset: int = 0, length: int | None = None) -> bytes:
    async with source.stream(offset, length) as chunks:
        return b"".join([chunk async for chunk in chunks])


def ranges(registry: ScriptedRegistry) -> list[str | None]:
    """The Range headers of all requests for blobs."""
    return [record.range for record in registry.asked("GET", "/blobs/sha256")]


async def test_a_read_is_one_request(registry: ScriptedRegistry, blob: BlobSource) -> None:
    assert await blob.read(START, LENGTH) == WANTED
    assert await blob.read(0, len(DATA)) == DATA
    assert ranges(registry) == [f"bytes={START}-{START + LENGTH - 1}", None]


ONCE = [
    Reset(),
    Reset(after=300_000),
    Truncate(0),
    Truncate(300_000),
    Stall(300_000),
    Delay(1000),
    *(Status(status) for status in (500, 502, 503, 504, 429)),
]


@pytest.mark.parametrize("fault", ONCE, ids=repr)
async def test_a_passing_fault_costs_one_more_request(
    fault: Action,
    registry: ScriptedRegistry,
    blob: BlobSource,
    transport: Transport,
    clock: trio.testing.MockClock,
) -> None:
    registry.faults.add(fault, method="GET", path="/blobs/")
    assert await blob.read(START, LENGTH) == WANTED
    assert len(ranges(registry)) == 2
    assert transport.stats.retries == 1
    registry.faults.add(fault, method="GET", path="/blobs/")
    assert await streamed(blob) == DATA
    assert len(ranges(registry)) == 4
    registry.faults.add(fault, method="GET", path="/blobs/")
    assert await streamed(blob, START, LENGTH) == WANTED
    assert len(ranges(registry)) == 6


async def test_a_broken_transfer_goes_on_where_it_broke(registry: ScriptedRegistry, blob: BlobSource) -> None:
    registry.faults.add(Truncate(300_000), method="GET", path="/blobs/")
    assert await blob.read(START, LENGTH) == WANTED
    registry.faults.add(Truncate(400_000), method="GET", path="/blobs/")
    assert await streamed(blob) == DATA
    end = START + LENGTH - 1
    assert ranges(registry) == [
        f"bytes={START}-{end}",
        f"bytes={START + 300_000}-{end}",
        None,
        f"bytes=400000-{len(DATA) - 1}",
    ]


async def test_a_long_stream_survives_more_faults_than_it_has_tries(
    registry: ScriptedRegistry, repository: RegistryRepository, clock: trio.testing.MockClock
) -> None:
    data = os.urandom(4 << 20)
    blob = await push(repository, data)
    registry.faults.add(Truncate(300_000), method="GET", path="/blobs/", count=None)
    assert await streamed(blob) == data
    assert len(ranges(registry)) == -(-len(data) // 300_000)


@pytest.mark.parametrize(
    "fault", [Reset(), Truncate(0), Stall(0), Delay(1000), Status(503), Truncate(100)], ids=repr
)
async def test_lasting_faults_end_within_the_deadline(
    fault: Action,
    registry: ScriptedRegistry,
    blob: BlobSource,
    settings: Settings,
    clock: trio.testing.MockClock,
) -> None:
    registry.faults.add(fault, method="GET", path="/blobs/", count=None)
    start = trio.current_time()
    with pytest.raises(Unavailable) as caught:
        await blob.read(START, 4096)
    assert trio.current_time() - start <= settings.read_deadline_s + 15
    assert blob.name in caught.value.message
    assert len(ranges(registry)) <= 10
    with pytest.raises(Unavailable):
        await streamed(blob)
    registry.faults.clear()
    assert await blob.read(START, LENGTH) == WANTED


async def test_reads_fail_while_the_registry_is_away_and_work_when_it_is_back(
    registry: ScriptedRegistry, blob: BlobSource, clock: trio.testing.MockClock
) -> None:
    assert await blob.read(START, LENGTH) == WANTED
    async with registry.down():
        with pytest.raises(Unavailable):
            await blob.read(START, LENGTH)
    assert await blob.read(START, LENGTH) == WANTED


async def test_a_short_absence_is_not_noticed(
    registry: ScriptedRegistry, blob: BlobSource, clock: trio.testing.MockClock
) -> None:
    got: list[bytes] = []

    async def read() -> None:
        got.append(await blob.read(START, LENGTH))

    async with trio.open_nursery() as nursery, registry.down():
        nursery.start_soon(read)
        await trio.sleep(5)
    assert got == [WANTED]


async def test_slow_is_not_broken_but_trickling_is(
    registry: ScriptedRegistry, blob: BlobSource, clock: trio.testing.MockClock
) -> None:
    registry.faults.add(Rate(16 << 10), method="GET", path="/blobs/")
    assert await blob.read(START, 200_000) == WANTED[:200_000]
    assert len(ranges(registry)) == 1
    registry.faults.add(Rate(100), method="GET", path="/blobs/", count=None)
    with pytest.raises(Unavailable):
        await blob.read(START, 20_000)


async def test_retry_after_is_waited_for(
    registry: ScriptedRegistry, blob: BlobSource, clock: trio.testing.MockClock
) -> None:
    registry.faults.add(rate_limited("12"), method="GET", path="/blobs/")
    start = trio.current_time()
    assert await blob.read(START, LENGTH) == WANTED
    assert trio.current_time() - start >= 12


async def test_a_rate_limit_past_the_deadline_is_told_at_once(
    registry: ScriptedRegistry, blob: BlobSource, clock: trio.testing.MockClock
) -> None:
    registry.faults.add(rate_limited("100"), method="GET", path="/blobs/", count=None)
    with pytest.raises(RateLimited, match=r"answered 429 \(TOOMANYREQUESTS: slow down\)") as caught:
        await blob.read(START, 4096)
    assert caught.value.retry_after_s == 100
    assert len(ranges(registry)) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RegistryError), (403, Unauthorized), (404, NotFound), (410, NotFound), (501, RegistryError)],
)
async def test_final_statuses_are_asked_once(
    status: int, kind: type[RegistryError], registry: ScriptedRegistry, blob: BlobSource
) -> None:
    registry.faults.add(Status(status), method="GET", path="/blobs/", count=None)
    with pytest.raises(RegistryError) as caught:
        await blob.read(START, 4096)
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert len(ranges(registry)) == 1


WRONG = [
    WrongRange(),
    WrongRange(shift=5000),
    WrongRange(lie="total"),
    Status(416, (("Content-Range", "bytes */5"),)),
    SetHeader("Content-Range", "bytes"),
    SetHeader("Content-Encoding", "gzip"),
    Status(206, (), b"x" * LENGTH),
    Status(200, (), b"too short"),
]


@pytest.mark.parametrize("fault", WRONG, ids=repr)
async def test_misplaced_bytes_are_asked_for_again_once(
    fault: Action, registry: ScriptedRegistry, blob: BlobSource
) -> None:
    registry.faults.add(fault, method="GET", path="/blobs/")
    assert await blob.read(START, LENGTH) == WANTED
    assert len(ranges(registry)) == 2
    registry.faults.add(fault, method="GET", path="/blobs/", count=None)
    with trio.fail_after(30), pytest.raises(IntegrityError) as caught:
        await blob.read(START, LENGTH)
    assert blob.name in caught.value.message
    assert len(ranges(registry)) == 4
    with trio.fail_after(30), pytest.raises(IntegrityError):
        await streamed(blob, START, LENGTH)
    assert len(ranges(registry)) == 6


async def test_a_range_that_the_registry_does_not_have(registry: ScriptedRegistry, blob: BlobSource) -> None:
    registry.faults.add(Status(416, (("Content-Range", "bytes */5"),)), method="GET", count=None)
    with pytest.raises(IntegrityError, match=r"got 416, .* \(bytes \*/5\)"):
        await blob.read(START, LENGTH)


async def test_without_ranges_what_is_near_the_start_is_read(
    registry: ScriptedRegistry, blob: BlobSource, transport: Transport
) -> None:
    registry.faults.add(IgnoreRange(), method="GET", path="/blobs/", count=None)
    assert await blob.read(10, 1000) == DATA[10:1010]
    assert transport.stats.bytes_received < len(DATA)
    assert await blob.read(START, LENGTH) == WANTED
    assert await blob.read(len(DATA) - 5, 5) == DATA[-5:]
    assert await streamed(blob, 12345) == DATA[12345:]


async def test_without_ranges_what_is_far_is_an_error_and_no_download(
    registry: ScriptedRegistry, repository: RegistryRepository, transport: Transport
) -> None:
    data = os.urandom(SKIP_LIMIT + 100_000)
    blob = await push(repository, data)
    registry.faults.add(IgnoreRange(), method="GET", path="/blobs/", count=None)
    before = transport.stats.bytes_received
    with pytest.raises(RegistryError, match="whole blob when asked for a range") as caught:
        await blob.read(SKIP_LIMIT + 1, 10)
    assert "ranges" in str(caught.value.hint)
    assert transport.stats.bytes_received == before
    registry.faults.add(Truncate(SKIP_LIMIT + 50_000), method="GET", path="/blobs/")
    assert await streamed(blob) == data


@pytest.mark.parametrize(("body", "kind"), [(b"0123456", IntegrityError), (b"", Unavailable)])
async def test_ranges_of_another_length(
    body: bytes,
    kind: type[Exception],
    transport: Transport,
    settings: Settings,
    clock: trio.testing.MockClock,
) -> None:
    """Without Content-Length, only counting shows that an answer is too long or too short."""

    async def answer(seen: Seen, wire: Wire) -> None:
        head = "HTTP/1.1 206 X\r\nContent-Range: bytes 10-15/100\r\nConnection: close\r\n\r\n"
        await wire.send(head.encode() + body)
        await wire.close()

    async with serve(answer) as server:
        blob = repository_at(server.host, "app", transport, settings).blob(
            Descriptor(OCI_LAYER, Digest.of(b""), 100)
        )
        with pytest.raises(kind):
            await blob.read(10, 6)
    assert len(server.seen) <= 10


class TestRedirects:
    """A registry that keeps its blobs in an object store."""

    @pytest.fixture
    def store(self) -> ObjectStore:
        return ObjectStore()

    @pytest.fixture
    async def registry(self, tmp_path: Path, store: ObjectStore) -> AsyncIterator[ScriptedRegistry]:
        async with scripted_registry(tmp_path / "registry", object_store=store) as registry:
            yield registry

    async def test_the_redirect_is_remembered(
        self, registry: ScriptedRegistry, store: ObjectStore, blob: BlobSource
    ) -> None:
        for start in range(0, 500_000, 100_000):
            assert await blob.read(start, 5000) == DATA[start : start + 5000]
        assert await streamed(blob) == DATA
        assert len(ranges(registry)) == 1
        assert len(store.requests) == 6

    @pytest.mark.parametrize(
        "expired", [expired_xml(), *(Status(status) for status in (401, 403, 404, 410))], ids=repr
    )
    async def test_an_expired_redirect_is_renewed_once(
        self,
        expired: Status,
        registry: ScriptedRegistry,
        store: ObjectStore,
        blob: BlobSource,
        transport: Transport,
    ) -> None:
        store.expired = expired
        assert await blob.read(0, 5000) == DATA[:5000]
        store.expire()
        assert await blob.read(START, LENGTH) == WANTED
        assert len(ranges(registry)) == 2
        assert transport.stats.retries == 0
        store.max_uses = 0
        store.expire()
        with pytest.raises(RegistryError) as caught:
            await blob.read(START + 1, LENGTH)
        assert caught.value.status == expired.status
        assert not isinstance(caught.value, Unauthorized)  # the user's login is not to blame
        assert len(ranges(registry)) == 3

    async def test_expiry_in_the_middle_of_a_stream(
        self, registry: ScriptedRegistry, store: ObjectStore, blob: BlobSource
    ) -> None:
        store.max_uses = 1
        store.faults.add(Truncate(300_000))
        assert await streamed(blob) == DATA
        assert len(ranges(registry)) == 2

    @pytest.mark.parametrize("fault", [Reset(), Truncate(1000), Stall(0), Status(503), WrongRange()], ids=repr)
    async def test_faults_of_the_store_lead_back_to_the_registry(
        self,
        fault: Action,
        registry: ScriptedRegistry,
        store: ObjectStore,
        blob: BlobSource,
        clock: trio.testing.MockClock,
    ) -> None:
        assert await blob.read(0, 5000) == DATA[:5000]
        store.faults.add(fault)
        assert await blob.read(START, LENGTH) == WANTED
        assert len(ranges(registry)) == 2

    async def test_many_readers_meet_an_expired_redirect(
        self, registry: ScriptedRegistry, store: ObjectStore, blob: BlobSource
    ) -> None:
        assert await blob.read(0, 5000) == DATA[:5000]
        store.expire()
        wrong: list[int] = []

        async def read(start: int) -> None:
            if await blob.read(start, 5000) != DATA[start : start + 5000]:
                wrong.append(start)

        async with trio.open_nursery() as nursery:
            for start in range(0, 1_000_000, 100_000):
                nursery.start_soon(read, start)
        assert not wrong

    async def test_messages_do_not_show_the_signature(
        self, registry: ScriptedRegistry, store: ObjectStore, blob: BlobSource
    ) -> None:
        store.faults.add(Status(400, (), b"signature?"), count=None)
        with pytest.raises(RegistryError) as caught:
            await blob.read(START, 10)
        assert "Signature" not in f"{caught.value} {caught.value.hint} {caught.value!r}"


async def test_redirects_do_not_go_round_for_ever(transport: Transport, settings: Settings) -> None:
    async def again(seen: Seen, wire: Wire) -> None:
        await wire.answer(307, headers={"Location": f"{seen.path}x"})

    async with serve(again) as server:
        blob = repository_at(server.host, "app", transport, settings).blob(
            Descriptor(OCI_LAYER, Digest.of(b""), 100)
        )
        with pytest.raises(RegistryError, match="redirects"):
            await blob.read(0, 10)
    assert len(server.seen) == 6


@pytest.mark.parametrize("location", ["", "http://user:hunter2@127.0.0.1/x", "ftp://127.0.0.1/", "http://["])
async def test_unusable_redirects(location: str, transport: Transport, settings: Settings) -> None:
    async def away(seen: Seen, wire: Wire) -> None:
        await wire.answer(302, headers={"Location": location})

    async with serve(away) as server:
        blob = repository_at(server.host, "app", transport, settings).blob(
            Descriptor(OCI_LAYER, Digest.of(b""), 100)
        )
        with pytest.raises(RegistryError, match="unusable Location") as caught:
            await blob.read(0, 10)
    assert "hunter2" not in caught.value.message


async def test_settings_bound_the_wait(
    tmp_path: Path, registry: ScriptedRegistry, blob: BlobSource, clock: trio.testing.MockClock
) -> None:
    settings = settings_in(tmp_path, read_deadline_s=3.0)
    registry.faults.add(Delay(1000), method="GET", path="/blobs/", count=None)
    async with Transport(settings) as transport:
        hasty = repository_at(registry.host, "team/app", transport, settings).blob(
            Descriptor(OCI_LAYER, Digest.of(DATA), len(DATA))
        )
        start = trio.current_time()
        with pytest.raises(Unavailable):
            await hasty.read(START, 10)
        assert trio.current_time() - start <= 15  # far less than the usual deadline
