"""Resolving, reading and storing manifests, and their referrers."""

import io
import json
from dataclasses import replace
from functools import partial

import pytest
import trio
import trio.testing

from tests.registry.servers import repository_at
from tests.transport.wire import Handler, Seen, Wire, serve
from veneer.errors import (
    IntegrityError,
    NotFound,
    RateLimited,
    RegistryError,
    Unauthorized,
    Unavailable,
    UnsupportedFormat,
    VeneerError,
)
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import MAX_MANIFEST_SIZE, build_index, build_manifest
from veneer.oci.mediatypes import EMPTY_JSON, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from veneer.registry.client import RegistryRepository
from veneer.settings import Settings
from veneer.testing.actions import (
    Action,
    Delay,
    DropHeader,
    FlipBit,
    Reset,
    SetHeader,
    Stall,
    Status,
    Truncate,
    html_page,
    rate_limited,
)
from veneer.testing.registry import ScriptedRegistry
from veneer.transport import Transport

CONFIG = b'{"os":"linux","architecture":"amd64"}'
CONFIG_DESCRIPTOR = Descriptor(OCI_CONFIG, Digest.of(CONFIG), len(CONFIG))
DATA = build_manifest(CONFIG_DESCRIPTOR, [])
DIGEST = str(Digest.of(DATA))
EXPECTED = Descriptor(OCI_MANIFEST, Digest.of(DATA), len(DATA))
SBOM = "application/vnd.example.sbom"


@pytest.fixture
async def repository(
    registry: ScriptedRegistry, transport: Transport, settings: Settings
) -> RegistryRepository:
    """With one image, tagged v1."""
    repository = repository_at(registry.host, "team/app", transport, settings)
    empty = Descriptor(EMPTY_JSON, Digest.of(b"{}"), 2)
    for descriptor, data in ((CONFIG_DESCRIPTOR, CONFIG), (empty, b"{}")):
        await repository.push_blob(descriptor, partial(io.BytesIO, data))
    await repository.push_manifest(DATA, OCI_MANIFEST, "v1")
    registry.requests.clear()
    return repository


def lines(registry: ScriptedRegistry) -> list[str]:
    return [f"{record.method} {record.path.removeprefix('/v2/team/app/')}" for record in registry.requests]


class TestReading:
    async def test_resolving_is_a_head_request(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        assert await repository.resolve("v1") == EXPECTED
        assert await repository.resolve(DIGEST) == EXPECTED
        assert lines(registry) == ["HEAD manifests/v1", f"HEAD manifests/{DIGEST}"]

    @pytest.mark.parametrize(
        "fault",
        [
            DropHeader("Docker-Content-Digest"),
            DropHeader("Content-Type"),
            SetHeader("Content-Type", "text/html"),
            Status(404),
            Status(405),
            Status(400),
        ],
        ids=repr,
    )
    async def test_what_head_does_not_say_get_does(
        self, fault: Action, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        registry.faults.add(fault, method="HEAD", count=None)
        assert await repository.resolve("v1") == EXPECTED
        assert lines(registry) == ["HEAD manifests/v1", "GET manifests/v1"]

    @pytest.mark.parametrize("value", ["sha256:" + "0" * 64, "sha256:xyz", "md5:abc"])
    async def test_another_digest_is_refused(
        self, value: str, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        registry.faults.add(SetHeader("Docker-Content-Digest", value), count=None)
        with pytest.raises(IntegrityError):
            await repository.resolve(DIGEST)
        for reference in ("v1", DIGEST):
            with pytest.raises(IntegrityError, match=f"team/app.{reference}: GET"):
                await repository.manifest(reference)

    async def test_one_flipped_bit_is_mended_and_two_are_not(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        for reference in ("v1", DIGEST):
            registry.faults.add(FlipBit(at=20), path="/manifests/")
            assert (await repository.manifest(reference)).data == DATA
            registry.faults.add(FlipBit(at=20), path="/manifests/", count=2)
            with pytest.raises(IntegrityError):
                await repository.manifest(reference)
        assert len(registry.requests) == 8

    async def test_the_digest_asked_for_counts_without_the_registrys_word(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        registry.faults.add(DropHeader("Docker-Content-Digest"), count=None)
        registry.faults.add(FlipBit(at=20), count=None)
        with pytest.raises(IntegrityError):
            await repository.manifest(DIGEST)

    @pytest.mark.parametrize("fault", [Reset(), Truncate(20), Stall(20), Delay(100), Status(502)], ids=repr)
    async def test_passing_faults(
        self,
        fault: Action,
        registry: ScriptedRegistry,
        repository: RegistryRepository,
        clock: trio.testing.MockClock,
    ) -> None:
        registry.faults.add(fault, path="/manifests/")
        assert (await repository.manifest("v1")).data == DATA
        assert len(registry.requests) == 2

    @pytest.mark.parametrize(
        ("status", "kind"),
        [(401, Unauthorized), (403, Unauthorized), (404, NotFound), (400, RegistryError), (503, Unavailable)],
    )
    async def test_lasting_faults(
        self,
        status: int,
        kind: type[RegistryError],
        registry: ScriptedRegistry,
        repository: RegistryRepository,
        clock: trio.testing.MockClock,
    ) -> None:
        registry.faults.add(Status(status), path="/manifests/", count=None)
        for operation in (repository.resolve, repository.manifest):
            with pytest.raises(RegistryError, match=f"{repository.name}:v1: ") as caught:
                await operation("v1")
            assert type(caught.value) is kind
        assert trio.current_time() < 60

    async def test_rate_limits(
        self, registry: ScriptedRegistry, repository: RegistryRepository, clock: trio.testing.MockClock
    ) -> None:
        registry.faults.add(rate_limited("3"), path="/manifests/")
        assert (await repository.manifest("v1")).data == DATA
        assert trio.current_time() >= 3
        registry.faults.add(rate_limited("3600"), path="/manifests/", count=None)
        with pytest.raises(RateLimited) as caught:
            await repository.manifest("v1")
        assert "log in" in str(caught.value.hint)

    async def test_size_is_bounded(self, registry: ScriptedRegistry, repository: RegistryRepository) -> None:
        registry.faults.add(Status(200, (), bytes(MAX_MANIFEST_SIZE + 1)), count=None)
        with pytest.raises(RegistryError, match="longer than"):
            await repository.manifest("v1")

    @pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"schemaVersion":2}', DATA[:-1]])
    async def test_what_is_no_manifest_is_refused(
        self, body: bytes, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        registry.faults.add(Status(200, (("Content-Type", OCI_MANIFEST),), body), count=None)
        with pytest.raises((IntegrityError, UnsupportedFormat)):
            await repository.manifest("v1")

    async def test_content_type_and_document_must_agree(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        registry.faults.add(SetHeader("Content-Type", "application/json; charset=utf-8"))
        assert (await repository.manifest("v1")).descriptor == EXPECTED
        registry.faults.add(SetHeader("Content-Type", OCI_INDEX), count=None)
        with pytest.raises(VeneerError):
            await repository.manifest("v1")

    async def test_missing_images_have_a_hint(self, repository: RegistryRepository) -> None:
        with pytest.raises(NotFound, match=r"GET 127\.0\.0\.1:\d+: answered 404 \(MANIFEST_UNKNOWN") as caught:
            await repository.resolve("absent")
        assert "until you log in" in str(caught.value.hint)


class TestStoring:
    async def test_another_digest_is_an_error(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        registry.faults.add(SetHeader("Docker-Content-Digest", "sha256:" + "0" * 64), method="PUT")
        with pytest.raises(IntegrityError, match="stored as something else"):
            await repository.push_manifest(DATA, OCI_MANIFEST, "v2")

    @pytest.mark.parametrize("fault", [Reset(), Status(503), Delay(100)], ids=repr)
    async def test_passing_faults(
        self,
        fault: Action,
        registry: ScriptedRegistry,
        repository: RegistryRepository,
        clock: trio.testing.MockClock,
    ) -> None:
        registry.faults.add(fault, method="PUT")
        assert await repository.push_manifest(DATA, OCI_MANIFEST, "v2") == EXPECTED
        assert await repository.resolve("v2") == EXPECTED

    async def test_what_is_no_manifest_is_not_sent(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        with pytest.raises(VeneerError):
            await repository.push_manifest(b"{}", OCI_MANIFEST, "v2")
        assert registry.requests == []


async def attach(repository: RegistryRepository, note: str, artifact_type: str = SBOM) -> Descriptor:
    empty = Descriptor(EMPTY_JSON, Digest.of(b"{}"), 2)
    data = build_manifest(
        empty, [empty], subject=EXPECTED, artifact_type=artifact_type, annotations={"note": note}
    )
    return await repository.push_manifest(data, OCI_MANIFEST)


def notes(found: list[Descriptor]) -> list[str]:
    return sorted(entry.annotations["note"] for entry in found)


class TestReferrers:
    async def test_the_api_is_enough(self, registry: ScriptedRegistry, repository: RegistryRepository) -> None:
        await attach(repository, "a")
        registry.requests.clear()
        assert notes(await repository.referrers(EXPECTED.digest, SBOM)) == ["a"]
        assert lines(registry) == [f"GET referrers/{DIGEST}"]
        assert registry.requests[0].query == "artifactType=application/vnd.example.sbom"

    async def test_a_filter_that_is_ignored_is_applied_here(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        await attach(repository, "a")
        await attach(repository, "b", "application/vnd.example.other")
        everything = json.dumps(json.loads(build_index(await repository.referrers(EXPECTED.digest)))).encode()
        registry.faults.add(Status(200, (("Content-Type", OCI_INDEX),), everything), path="/referrers/")
        assert notes(await repository.referrers(EXPECTED.digest, SBOM)) == ["a"]

    @pytest.mark.parametrize(
        "unknown",
        [Status(404), Status(405), Status(400), Status(501), html_page(), Status(200, (), b"{}")],
        ids=lambda fault: f"{fault.status}-{fault.body[:5]!r}",
    )
    async def test_registries_without_the_api(
        self, unknown: Status, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        registry.faults.add(unknown, path="/referrers/", count=None)
        registry.faults.add(DropHeader("OCI-Subject"), method="PUT", count=None)
        assert await repository.referrers(EXPECTED.digest) == []
        await attach(repository, "a")
        await attach(repository, "b", "application/vnd.example.other")
        await attach(repository, "a")
        assert notes(await repository.referrers(EXPECTED.digest)) == ["a", "b"]
        assert notes(await repository.referrers(EXPECTED.digest, SBOM)) == ["a"]
        assert (await repository.resolve(f"sha256-{EXPECTED.digest.hex}")).media_type == OCI_INDEX

    async def test_entries_without_type_are_looked_up(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        """Some clients leave out artifact type and annotations when they write the list."""
        found = [await attach(repository, "a"), await attach(repository, "b", "application/vnd.example.other")]
        gone = Descriptor(OCI_MANIFEST, Digest.of(b"gone"), 4)
        old = b'{"schemaVersion":1}'
        strange = Descriptor(OCI_MANIFEST, Digest.of(old), len(old))
        kind = ("Content-Type", "application/vnd.docker.distribution.manifest.v1+json")
        registry.faults.add(Status(200, (kind,), old), path=f"/manifests/{strange.digest}")
        registry.faults.add(Status(404), path="/referrers/", count=None)
        untyped = [Descriptor(OCI_MANIFEST, entry.digest, entry.size) for entry in found]
        bare = build_index([strange, *untyped, gone])
        where = f"/manifests/sha256-{EXPECTED.digest.hex}"
        registry.faults.add(Status(200, (("Content-Type", OCI_INDEX),), bare), path=where, count=None)
        assert [entry.digest for entry in await repository.referrers(EXPECTED.digest, SBOM)] == [
            found[0].digest
        ]

    async def test_of_very_many_entries_without_type_only_some_are_looked_up(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        gone = [Descriptor(OCI_MANIFEST, Digest.of(b"%d" % number), 1) for number in range(50)]
        last = replace(EXPECTED, annotations={"note": "with its type"}, artifact_type=SBOM)
        registry.faults.add(
            Status(200, (("Content-Type", OCI_INDEX),), build_index([*gone, last])), path="/referrers/"
        )
        del registry.requests[:]
        assert notes(await repository.referrers(EXPECTED.digest, SBOM)) == ["with its type"]
        assert len(registry.asked("GET", "/manifests/")) == 32

    async def test_faults_are_not_taken_for_absence(
        self, registry: ScriptedRegistry, repository: RegistryRepository, clock: trio.testing.MockClock
    ) -> None:
        await attach(repository, "a")
        registry.faults.add(Status(503), path="/referrers/")
        assert notes(await repository.referrers(EXPECTED.digest)) == ["a"]
        registry.faults.add(Status(503), path="/referrers/", count=None)
        with pytest.raises(Unavailable):
            await repository.referrers(EXPECTED.digest)

    async def test_another_writer_is_not_overwritten(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        registry.faults.add(Status(404), path="/referrers/", count=None)
        registry.faults.add(DropHeader("OCI-Subject"), method="PUT", count=None)
        registry.faults.add(Status(412), method="PUT", path="/manifests/sha256-", count=2)
        await attach(repository, "a")
        assert notes(await repository.referrers(EXPECTED.digest)) == ["a"]

    async def test_the_list_that_was_read_is_the_one_that_is_replaced(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        where = f"/manifests/sha256-{EXPECTED.digest.hex}"
        registry.faults.add(Status(404), path="/referrers/", count=None)
        registry.faults.add(DropHeader("OCI-Subject"), method="PUT", count=None)
        await attach(repository, "a")
        registry.faults.add(SetHeader("ETag", '"read"'), method="GET", path=where, count=None)
        other = registry.faults.add(
            Status(412), path=where, when=lambda request: request.header("if-match") != '"read"', method="PUT"
        )
        await attach(repository, "b")
        assert not other.hits
        assert notes(await repository.referrers(EXPECTED.digest)) == ["a", "b"]

    async def test_what_another_writer_has_overwritten_is_written_again(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        """Where If-Match means nothing."""
        where = f"/manifests/sha256-{EXPECTED.digest.hex}"
        registry.faults.add(Status(404), path="/referrers/", count=None)
        registry.faults.add(DropHeader("OCI-Subject"), method="PUT", count=None)
        without = build_index([await attach(repository, "a")])
        del registry.requests[:]
        registry.faults.add(
            Status(200, (("Content-Type", OCI_INDEX),), without),
            method="GET",
            path=where,
            when=lambda _: len(registry.asked("PUT", where)) == 1,
        )
        await attach(repository, "b")
        assert len(registry.asked("PUT", where)) == 2

    async def test_a_list_that_is_none_is_an_error_and_not_overwritten(
        self, registry: ScriptedRegistry, repository: RegistryRepository
    ) -> None:
        tag = f"sha256-{EXPECTED.digest.hex}"
        await repository.push_manifest(DATA, OCI_MANIFEST, tag)
        registry.faults.add(Status(404), path="/referrers/", count=None)
        registry.faults.add(DropHeader("OCI-Subject"), method="PUT", count=None)
        with pytest.raises(IntegrityError, match="the list of referrers is no index"):
            await repository.referrers(EXPECTED.digest)
        with pytest.raises(IntegrityError, match="the list of referrers is no index"):
            await attach(repository, "a")
        assert await repository.resolve(tag) == EXPECTED


def paged(following: str) -> Handler:
    """A registry whose every page names a next one."""
    index = build_index([EXPECTED])

    async def handler(seen: Seen, wire: Wire) -> None:
        await wire.answer(200, index, {"Content-Type": OCI_INDEX, "Link": f'<{following}>; rel="next"'})

    return handler


@pytest.mark.parametrize(
    "following", ["/v2/app/referrers/x?n=1", "http://127.0.0.2:1/v2/", "https://evil.example/"]
)
async def test_lists_that_do_not_end_are_refused(
    following: str, transport: Transport, settings: Settings
) -> None:
    async with serve(paged(following)) as server:
        repository = repository_at(server.host, "app", transport, settings)
        with pytest.raises(RegistryError, match="does not end, or leads to another host"):
            await repository.referrers(EXPECTED.digest)
    assert len(server.seen) <= 100


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [(200, "text/html", b"<!doctype html><title>Sign in</title>"), (404, OCI_INDEX, b"")],
    ids=["login page", "missing"],
)
async def test_a_list_of_which_a_part_is_missing_is_an_error(
    status: int, kind: str, body: bytes, transport: Transport, settings: Settings
) -> None:
    """What is on the pages before is not all; nor does the registry have no list."""
    first = build_index([EXPECTED])

    async def pages(seen: Seen, wire: Wire) -> None:
        if "page=1" in seen.query:
            await wire.answer(status, body, {"Content-Type": kind})
        else:
            await wire.answer(200, first, {"Content-Type": OCI_INDEX, "Link": "<?page=1>; rel=next"})

    async with serve(pages) as server:
        repository = repository_at(server.host, "app", transport, settings)
        with pytest.raises(RegistryError):
            await repository.referrers(EXPECTED.digest)
    assert [seen.query for seen in server.seen if "/referrers/" in seen.path] == ["", "page=1"]
    assert not [seen.path for seen in server.seen if "/manifests/" in seen.path], "there is no need for the tag"


async def test_a_list_that_is_malformed_is_not_taken_for_none(transport: Transport, settings: Settings) -> None:
    async def broken(seen: Seen, wire: Wire) -> None:
        await wire.answer(200, b'{"schemaVersion":2,"manifests":[{}]}', {"Content-Type": OCI_INDEX})

    async with serve(broken) as server:
        repository = repository_at(server.host, "app", transport, settings)
        with pytest.raises(IntegrityError, match="index entry 0"):
            await repository.referrers(EXPECTED.digest)
    assert not [seen.path for seen in server.seen if "/manifests/" in seen.path]


async def test_pages_are_followed(transport: Transport, settings: Settings) -> None:
    async def pages(seen: Seen, wire: Wire) -> None:
        number = int(seen.query.partition("page=")[2] or 0)
        entry = Descriptor(
            OCI_MANIFEST, Digest.of(b"%d" % number), 5, {"note": str(number)}, artifact_type=SBOM
        )
        headers = {"Content-Type": OCI_INDEX}
        if number < 3:
            # What another link says is not about this one.
            headers["Link"] = f'<?page=9>; title=all <?page={number + 1}>; title="x"; rel=next'
        await wire.answer(200, build_index([entry]), headers)

    async with serve(pages) as server:
        repository = repository_at(server.host, "app", transport, settings)
        assert notes(await repository.referrers(EXPECTED.digest)) == ["0", "1", "2", "3"]
