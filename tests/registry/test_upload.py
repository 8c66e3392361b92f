"""Uploads: small and large, relative and absolute locations, and faults in the middle."""

import hashlib
import io
import os
from collections.abc import Callable
from typing import BinaryIO

import pytest
import trio
import trio.testing

from tests.registry.servers import repository_at
from tests.transport.wire import Seen, Wire, serve
from veneer.errors import IntegrityError, RegistryError, Unavailable
from veneer.events import Event, Progress
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER
from veneer.registry.client import RegistryRepository
from veneer.registry.upload import CHUNK_SIZE, MONOLITHIC_LIMIT
from veneer.settings import Settings
from veneer.testing.actions import Action, Delay, Reset, Status
from veneer.testing.registry import ScriptedRegistry
from veneer.transport import Transport

SMALL = os.urandom(100_000)
LARGE = os.urandom(2 * CHUNK_SIZE + 12345)


def described(data: bytes) -> Descriptor:
    return Descriptor(OCI_LAYER, Digest.of(data), len(data))


def opener(data: bytes) -> Callable[[], BinaryIO]:
    return lambda: io.BytesIO(data)


def methods(registry: ScriptedRegistry) -> list[str]:
    return [record.method for record in registry.requests]


async def stored(repository: RegistryRepository, data: bytes) -> bool:
    return await repository.blob(described(data)).read(0, len(data)) == data


async def test_small_blobs_go_in_one_piece(registry: ScriptedRegistry, repository: RegistryRepository) -> None:
    await repository.push_blob(described(SMALL), opener(SMALL))
    assert methods(registry) == ["HEAD", "POST", "PUT"]
    await repository.push_blob(described(SMALL), opener(SMALL))
    assert methods(registry) == ["HEAD", "POST", "PUT", "HEAD"]
    assert await stored(repository, SMALL)


async def test_large_blobs_go_in_chunks(registry: ScriptedRegistry, repository: RegistryRepository) -> None:
    events: list[Event] = []
    await repository.push_blob(described(LARGE), opener(LARGE), events.append)
    assert methods(registry) == ["HEAD", "POST", "PATCH", "PATCH", "PATCH", "PUT"]
    done = [event.done for event in events if isinstance(event, Progress)]
    assert done == [CHUNK_SIZE, 2 * CHUNK_SIZE, len(LARGE)]
    assert await stored(repository, LARGE)


async def test_the_same_blob_is_sent_once(registry: ScriptedRegistry, repository: RegistryRepository) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(repository.push_blob, described(SMALL), opener(SMALL))
    assert methods(registry) == ["HEAD", "POST", "PUT", "HEAD", "HEAD", "HEAD"]


FAULTS = [Reset(), Delay(100), Status(500), Status(503), Status(429)]


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize(("method", "nth"), [("HEAD", 1), ("POST", 1), ("PATCH", 1), ("PATCH", 3), ("PUT", 1)])
async def test_a_passing_fault_does_not_end_an_upload(
    fault: Action,
    method: str,
    nth: int,
    registry: ScriptedRegistry,
    repository: RegistryRepository,
    clock: trio.testing.MockClock,
) -> None:
    registry.faults.add(fault, method=method, nth=nth)
    events: list[Event] = []
    await repository.push_blob(described(LARGE), opener(LARGE), events.append)
    assert await stored(repository, LARGE)
    done = [event.done for event in events if isinstance(event, Progress)]
    assert done == sorted(done)
    assert done.count(len(LARGE)) == 1
    if method == "PATCH" and nth == 3:
        assert methods(registry).count("POST") == 1  # went on, did not begin again
        assert methods(registry).count("PATCH") == 4


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_a_passing_fault_of_a_small_upload(
    fault: Action,
    method: str,
    registry: ScriptedRegistry,
    repository: RegistryRepository,
    clock: trio.testing.MockClock,
) -> None:
    registry.faults.add(fault, method=method)
    await repository.push_blob(described(SMALL), opener(SMALL))
    assert await stored(repository, SMALL)


@pytest.mark.parametrize("status", [404, 416])
@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_a_forgotten_session_is_begun_again(
    status: int, method: str, registry: ScriptedRegistry, repository: RegistryRepository
) -> None:
    registry.faults.add(Status(status), method=method)
    await repository.push_blob(described(LARGE), opener(LARGE))
    assert methods(registry).count("POST") == 2
    assert await stored(repository, LARGE)


async def test_sessions_that_are_always_forgotten_end_the_upload(
    registry: ScriptedRegistry, repository: RegistryRepository
) -> None:
    registry.faults.add(Status(404), method="PATCH", count=None)
    with pytest.raises(RegistryError):
        await repository.push_blob(described(LARGE), opener(LARGE))
    assert methods(registry).count("POST") == 4


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_lasting_faults_end_the_upload(
    data: bytes, registry: ScriptedRegistry, repository: RegistryRepository, clock: trio.testing.MockClock
) -> None:
    for method in ("PUT", "POST", "HEAD"):
        registry.faults.add(Status(503), method=method, count=None)
        with pytest.raises(Unavailable, match=str(described(data).digest)):
            await repository.push_blob(described(data), opener(data))
    assert len(registry.requests) < 80


async def test_refusals_are_final(registry: ScriptedRegistry, repository: RegistryRepository) -> None:
    registry.faults.add(Status(413), method="PATCH", count=None)
    with pytest.raises(RegistryError, match="answered 413"):
        await repository.push_blob(described(LARGE), opener(LARGE))
    assert methods(registry) == ["HEAD", "POST", "PATCH", "DELETE"]


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("change", ["flip", "short", "long"])
async def test_other_bytes_than_promised_are_not_sent_to_the_end(
    data: bytes, change: str, registry: ScriptedRegistry, repository: RegistryRepository
) -> None:
    actual = {"flip": data[:-1] + bytes([data[-1] ^ 1]), "short": data[:-1], "long": data + b"x"}[change]
    with pytest.raises(IntegrityError, match="the bytes to push"):
        await repository.push_blob(described(data), opener(actual))
    assert "PUT" not in methods(registry)
    assert methods(registry)[-1] == "DELETE"


class MinimalRegistry:
    """Uploads as a registry may also do them: absolute locations, ranges with a unit, large minimal chunks."""

    def __init__(self, minimum: int = 0) -> None:
        self.minimum = minimum
        self.data = b""
        self.take: int | None = None
        self.lose_answer = False
        self.done: bytes | None = None

    async def __call__(self, seen: Seen, wire: Wire) -> None:
        where = {"Location": f"http://{seen.headers['host']}/v2/app/blobs/uploads/1?state={len(self.data)}"}
        if seen.method == "HEAD":
            await wire.answer(404 if self.done is None else 200, length=len(self.done or b""))
        elif seen.method == "POST":
            await wire.answer(202, headers={**where, "OCI-Chunk-Min-Length": str(self.minimum)})
        elif f"state={len(self.data)}" not in seen.query:
            await wire.answer(400)
        elif seen.method == "PATCH":
            start, end = map(int, seen.headers["content-range"].split("-"))
            assert (start, end - start + 1) == (len(self.data), len(seen.body))
            taken = seen.body[: self.take]
            self.take = None
            self.data += taken
            where["Location"] = where["Location"].partition("=")[0] + f"={len(self.data)}"
            await wire.answer(202, headers={**where, "Range": f"bytes=0-{len(self.data) - 1}"})
        elif seen.method == "GET":
            await wire.answer(204, headers={**where, "Range": f"0-{len(self.data) - 1}"})
        else:
            self.done = self.data + seen.body
            assert hashlib.sha256(self.done).hexdigest() in seen.query
            if self.lose_answer:
                self.data = b"?"  # the session is over
                await wire.reset()
            else:
                await wire.answer(201)


async def test_a_chunk_that_was_taken_in_part_is_completed(transport: Transport, settings: Settings) -> None:
    registry = MinimalRegistry()
    registry.take = 5_000_000
    async with serve(registry) as server:
        await repository_at(server.host, "app", transport, settings).push_blob(described(LARGE), opener(LARGE))
    assert registry.done == LARGE


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_an_answer_that_is_lost_does_not_repeat_the_upload(
    data: bytes, transport: Transport, settings: Settings
) -> None:
    """The blob was stored, but the connection broke before the answer came."""
    registry = MinimalRegistry()
    registry.lose_answer = True
    async with serve(registry) as server:
        await repository_at(server.host, "app", transport, settings).push_blob(described(data), opener(data))
    assert registry.done == data
    assert [seen.method for seen in server.seen].count("POST") == 1


async def test_larger_chunks_are_sent_when_asked_for(transport: Transport, settings: Settings) -> None:
    registry = MinimalRegistry(minimum=2 * CHUNK_SIZE)
    async with serve(registry) as server:
        await repository_at(server.host, "app", transport, settings).push_blob(described(LARGE), opener(LARGE))
    assert registry.done == LARGE
    assert [seen.method for seen in server.seen].count("PATCH") == 2


@pytest.mark.parametrize("location", ["", "https://user:pw@127.0.0.1/", "file:///x"])
async def test_unusable_locations(location: str, transport: Transport, settings: Settings) -> None:
    async def registry(seen: Seen, wire: Wire) -> None:
        await wire.answer(404 if seen.method == "HEAD" else 202, headers={"Location": location})

    async with serve(registry) as server:
        repository = repository_at(server.host, "app", transport, settings)
        with pytest.raises(RegistryError, match="unusable Location"):
            await repository.push_blob(described(SMALL), opener(SMALL))


async def test_mounts(registry: ScriptedRegistry, transport: Transport, settings: Settings) -> None:
    one = repository_at(registry.host, "team/one", transport, settings)
    two = repository_at(registry.host, "team/two", transport, settings)
    stranger = repository_at("registry.example", "team/one", transport, settings)
    await one.push_blob(described(SMALL), opener(SMALL))
    registry.requests.clear()
    assert not await two.mount_blob(described(SMALL), stranger)
    assert registry.requests == []
    assert await two.mount_blob(described(SMALL), one)
    assert methods(registry) == ["POST"]
    assert not await two.mount_blob(described(b"absent"), one)
    assert methods(registry) == ["POST", "POST", "DELETE"]


async def test_blobs_in_an_object_store_are_there(transport: Transport, settings: Settings) -> None:
    """The store may not answer HEAD at all: the redirect is the answer."""

    async def registry(seen: Seen, wire: Wire) -> None:
        await wire.answer(307, headers={"Location": "https://store.invalid/x"})

    async with serve(registry) as server:
        assert await repository_at(server.host, "app", transport, settings).has_blob(described(SMALL))


@pytest.mark.parametrize("status", [301, 302, 303])
async def test_what_is_pushed_is_not_sent_elsewhere_by_a_redirect_that_changes_the_method(
    status: int, transport: Transport, settings: Settings
) -> None:
    async def registry(seen: Seen, wire: Wire) -> None:
        await wire.answer(404 if seen.method == "HEAD" else status, headers={"Location": "/elsewhere"})

    async with serve(registry) as server:
        with pytest.raises(RegistryError, match=f"answered {status}"):
            await repository_at(server.host, "app", transport, settings).push_blob(
                described(SMALL), opener(SMALL)
            )
    assert "/elsewhere" not in [seen.path for seen in server.seen]


def test_limits_make_sense() -> None:
    assert len(SMALL) < MONOLITHIC_LIMIT < CHUNK_SIZE
