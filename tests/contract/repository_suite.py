"""What every Repository and BlobSource must do, whatever is behind it.

A subclass gives two fixtures, ``repository`` and ``other_repository``: two empty, writable repositories of one
registry (or two layouts on one disk), so that blobs can be mounted from one into the other.
"""

import io
import os
from collections.abc import Iterable
from typing import BinaryIO

import pytest
import trio

from veneer.errors import IntegrityError, NotFound, VeneerError
from veneer.events import Event, Progress
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import build_index, build_manifest
from veneer.oci.mediatypes import (
    DOCKER_CONFIG,
    DOCKER_LAYER_GZIP,
    DOCKER_MANIFEST,
    EMPTY_JSON,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
)
from veneer.source.base import BlobBody, BlobSource, Repository

#: Larger than every buffer that sits between a file or socket and its reader.
LARGE = 3 * (1 << 20) + 17


def described(data: bytes, media_type: str = OCI_LAYER) -> Descriptor:
    """The descriptor of ``data``."""
    return Descriptor(media_type, Digest.of(data), len(data))


def body(data: bytes) -> BlobBody:
    """Opens ``data`` from its beginning, as often as asked."""
    return lambda: io.BytesIO(data)


async def push(repository: Repository, data: bytes, media_type: str = OCI_LAYER) -> Descriptor:
    """Push ``data`` as a blob."""
    descriptor = described(data, media_type)
    await repository.push_blob(descriptor, body(data))
    return descriptor


async def push_image(
    repository: Repository, tag: str = "", content: bytes = b"layer"
) -> tuple[Descriptor, bytes]:
    """Push an image of one layer; gives its descriptor and bytes."""
    config = await push(repository, b'{"os":"linux","architecture":"amd64"}', OCI_CONFIG)
    layer = await push(repository, content)
    data = build_manifest(config, [layer])
    return await repository.push_manifest(data, OCI_MANIFEST, tag), data


async def push_referrer(
    repository: Repository, subject: Descriptor, artifact_type: str, note: str = ""
) -> Descriptor:
    """Push an artifact that refers to ``subject``."""
    config = await push(repository, b"{}", EMPTY_JSON)
    annotations = {"note": note} if note else {}
    data = build_manifest(
        config, [config], subject=subject, artifact_type=artifact_type, annotations=annotations
    )
    return await repository.push_manifest(data, OCI_MANIFEST)


async def streamed(source: BlobSource, offset: int = 0, length: int | None = None) -> bytes:
    """All that a stream gives."""
    async with source.stream(offset, length) as chunks:
        return b"".join([chunk async for chunk in chunks])


def digests(descriptors: Iterable[Descriptor]) -> list[str]:
    """Their digests in order."""
    return sorted(str(descriptor.digest) for descriptor in descriptors)


class RepositoryContract:
    """The contract; a subclass named ``Test...`` runs it."""

    # Manifests.

    async def test_manifest_by_tag_and_digest(self, repository: Repository) -> None:
        descriptor, data = await push_image(repository, "v1.0")
        assert (descriptor.media_type, descriptor.digest, descriptor.size) == (
            OCI_MANIFEST,
            Digest.of(data),
            len(data),
        )
        for reference in ("v1.0", str(descriptor.digest)):
            assert await repository.resolve(reference) == descriptor
            raw = await repository.manifest(reference)
            assert raw.data == data
            assert raw.descriptor == descriptor

    async def test_manifest_bytes_are_kept_as_pushed(self, repository: Repository) -> None:
        config = await push(repository, b"{}", OCI_CONFIG)
        data = build_manifest(config, []).replace(b",", b",\n   ")
        descriptor = await repository.push_manifest(data, OCI_MANIFEST, "odd")
        assert (await repository.manifest("odd")).data == data
        assert descriptor.digest == Digest.of(data)

    async def test_docker_manifest_keeps_its_type(self, repository: Repository) -> None:
        config = await push(repository, b'{"os":"linux"}', DOCKER_CONFIG)
        layer = await push(repository, b"docker layer", DOCKER_LAYER_GZIP)
        data = build_manifest(config, [layer], media_type=DOCKER_MANIFEST)
        await repository.push_manifest(data, DOCKER_MANIFEST, "docker")
        assert (await repository.resolve("docker")).media_type == DOCKER_MANIFEST
        assert (await repository.manifest(str(Digest.of(data)))).descriptor.media_type == DOCKER_MANIFEST

    async def test_index_and_its_manifests(self, repository: Repository) -> None:
        child, child_data = await push_image(repository)
        data = build_index([child])
        await repository.push_manifest(data, OCI_INDEX, "multi")
        assert (await repository.manifest("multi")).data == data
        assert (await repository.resolve("multi")).media_type == OCI_INDEX
        assert (await repository.manifest(str(child.digest))).data == child_data

    async def test_tag_moves(self, repository: Repository) -> None:
        first, first_data = await push_image(repository, "latest", b"one")
        second, _ = await push_image(repository, "latest", b"two")
        assert await repository.resolve("latest") == second
        assert (await repository.manifest(str(first.digest))).data == first_data

    async def test_several_tags_of_one_manifest(self, repository: Repository) -> None:
        first, _ = await push_image(repository, "a")
        await push_image(repository, "b")
        await push_image(repository, "a")
        assert await repository.resolve("a") == await repository.resolve("b") == first

    async def test_unknown_manifests_are_not_found(self, repository: Repository) -> None:
        absent = str(Digest.of(b"absent"))
        with pytest.raises(NotFound):  # of a repository that nothing was ever pushed to
            await repository.resolve("latest")
        await push_image(repository, "there")
        for reference in ("absent", absent):
            with pytest.raises(NotFound):
                await repository.resolve(reference)
            with pytest.raises(NotFound):
                await repository.manifest(reference)

    # Blobs.

    async def test_ranges_are_exact(self, repository: Repository) -> None:
        data = os.urandom(LARGE)
        source = repository.blob(await push(repository, data))
        assert source.size == LARGE
        for offset, length in [
            (0, 1),
            (0, LARGE),
            (LARGE - 1, 1),
            (4095, 2),
            (1 << 20, 1 << 20),
            (7, LARGE - 7),
        ]:
            assert await source.read(offset, length) == data[offset : offset + length]
        assert await source.read(5, 0) == b""

    async def test_ranges_outside_the_blob_are_refused(self, repository: Repository) -> None:
        source = repository.blob(await push(repository, b"0123456789"))
        for offset, length in [(0, 11), (10, 1), (11, 0), (1 << 40, 1), (-1, 2), (3, -1)]:
            with pytest.raises(IntegrityError):
                await source.read(offset, length)

    async def test_ranges_at_once(self, repository: Repository) -> None:
        data = os.urandom(LARGE)
        source = repository.blob(await push(repository, data))
        wrong: list[int] = []

        async def check(offset: int) -> None:
            if await source.read(offset, 5000) != data[offset : offset + 5000]:
                wrong.append(offset)

        async with trio.open_nursery() as nursery:
            for offset in range(0, LARGE - 5000, 200_001):
                nursery.start_soon(check, offset)
        assert not wrong

    async def test_stream_from_an_offset(self, repository: Repository) -> None:
        data = os.urandom(LARGE)
        source = repository.blob(await push(repository, data))
        for offset in (0, 1, 1 << 20, LARGE - 1, LARGE):
            assert await streamed(source, offset) == data[offset:]
        with pytest.raises(IntegrityError):
            await streamed(source, LARGE + 1)

    async def test_stream_of_a_range(self, repository: Repository) -> None:
        data = os.urandom(LARGE)
        source = repository.blob(await push(repository, data))
        for offset, length in ((0, 1), (1, 0), (70_001, 1 << 20), (LARGE - 9, 9), (0, LARGE), (LARGE, 0)):
            assert await streamed(source, offset, length) == data[offset : offset + length]
        for offset, length in ((0, LARGE + 1), (LARGE, 1), (5, -1)):
            with pytest.raises(IntegrityError):
                await streamed(source, offset, length)

    async def test_stream_may_be_left_early(self, repository: Repository) -> None:
        data = os.urandom(LARGE)
        source = repository.blob(await push(repository, data))
        async with source.stream() as chunks:
            first = await anext(chunks)
        assert data.startswith(first)
        assert await source.read(0, 10) == data[:10]

    async def test_empty_blob(self, repository: Repository) -> None:
        source = repository.blob(await push(repository, b""))
        assert await source.read(0, 0) == b""
        assert await streamed(source) == b""

    async def test_absent_blob(self, repository: Repository) -> None:
        await push_image(repository, "there")
        absent = described(b"absent")
        assert not await repository.has_blob(absent)
        source = repository.blob(absent)
        with pytest.raises(NotFound):
            await source.read(0, 1)
        with pytest.raises(NotFound):
            await streamed(source)

    async def test_a_blob_of_another_size_is_refused(self, repository: Repository) -> None:
        """A source that has other bytes than the descriptor says gives none of them."""
        real = await push(repository, b"0123456789")
        for size in (9, 11):
            false = Descriptor(real.media_type, real.digest, size)
            assert not await repository.has_blob(false)
            with pytest.raises(VeneerError):
                await repository.blob(false).read(0, size)
            with pytest.raises(VeneerError):
                await streamed(repository.blob(false))

    # Pushing.

    async def test_push_reports_progress_and_is_idempotent(self, repository: Repository) -> None:
        data = os.urandom(LARGE)
        descriptor = described(data)
        opened = 0
        events: list[Event] = []

        def opener() -> BinaryIO:
            nonlocal opened
            opened += 1
            return io.BytesIO(data)

        assert not await repository.has_blob(descriptor)
        await repository.push_blob(descriptor, opener, events.append)
        assert await repository.has_blob(descriptor)
        progress = [event for event in events if isinstance(event, Progress)]
        assert [event.done for event in progress] == sorted(event.done for event in progress)
        assert progress[-1].done == progress[-1].total == LARGE
        opened_once = opened
        assert opened_once >= 1
        await repository.push_blob(descriptor, opener)
        assert opened == opened_once
        assert await streamed(repository.blob(descriptor)) == data

    @pytest.mark.parametrize("actual", [b"0123456780", b"012345678", b"0123456789+", b""])
    async def test_push_of_other_bytes_is_refused(self, repository: Repository, actual: bytes) -> None:
        promised = described(b"0123456789")
        with pytest.raises(VeneerError):
            await repository.push_blob(promised, body(actual))
        assert not await repository.has_blob(promised)
        await push(repository, b"0123456789")
        assert await repository.blob(promised).read(0, 10) == b"0123456789"

    async def test_failing_body(self, repository: Repository) -> None:
        """What goes wrong while the body is read reaches the caller, and nothing is stored."""

        class Failing(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                raise IntegrityError("the body is broken")

        promised = described(b"0123456789")
        with pytest.raises(IntegrityError, match="the body is broken"):
            await repository.push_blob(promised, lambda: Failing(b"0123456789"))
        assert not await repository.has_blob(promised)

    async def test_same_blob_from_many_tasks(self, repository: Repository) -> None:
        data = os.urandom(LARGE)
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(push, repository, data)
        assert await streamed(repository.blob(described(data))) == data

    async def test_many_tags_at_once(self, repository: Repository) -> None:
        async def one(number: int) -> None:
            await push_image(repository, f"t{number}", b"layer %d" % number)

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(one, number)
        found = {(await repository.resolve(f"t{number}")).digest for number in range(8)}
        assert len(found) == 8

    async def test_mount_blob(self, repository: Repository, other_repository: Repository) -> None:
        data = os.urandom(LARGE)
        descriptor = await push(other_repository, data)
        assert await repository.mount_blob(descriptor, other_repository)
        assert await repository.has_blob(descriptor)
        assert await streamed(repository.blob(descriptor)) == data
        assert await repository.mount_blob(descriptor, other_repository)

    async def test_mount_of_an_absent_blob(self, repository: Repository, other_repository: Repository) -> None:
        await push_image(other_repository, "there")
        absent = described(b"absent")
        assert not await repository.mount_blob(absent, other_repository)
        assert not await repository.has_blob(absent)

    # Referrers.

    async def test_referrers(self, repository: Repository) -> None:
        image, _ = await push_image(repository, "app")
        other, _ = await push_image(repository, "other", b"other")
        assert await repository.referrers(image.digest) == []
        sbom = await push_referrer(repository, image, "application/vnd.example.sbom", "first")
        index = await push_referrer(repository, image, "application/vnd.example.index")
        stranger = await push_referrer(repository, other, "application/vnd.example.sbom")
        found = await repository.referrers(image.digest)
        assert digests(found) == digests([sbom, index])
        filtered = await repository.referrers(image.digest, "application/vnd.example.sbom")
        assert digests(filtered) == digests([sbom])
        assert filtered[0].media_type == OCI_MANIFEST
        assert filtered[0].size == sbom.size
        assert filtered[0].artifact_type == "application/vnd.example.sbom"
        assert filtered[0].annotations == {"note": "first"}
        assert digests(await repository.referrers(other.digest)) == digests([stranger])
        assert await repository.referrers(image.digest, "application/vnd.example.none") == []
        assert await repository.resolve("app") == image

    async def test_referrers_without_artifact_type_have_that_of_their_config(
        self, repository: Repository
    ) -> None:
        image, _ = await push_image(repository, "app")
        config = await push(repository, b'{"a":1}', "application/vnd.example.config.v1+json")
        data = build_manifest(config, [], subject=image)
        referrer = await repository.push_manifest(data, OCI_MANIFEST)
        found = await repository.referrers(image.digest, "application/vnd.example.config.v1+json")
        assert digests(found) == digests([referrer])

    async def test_referrers_pushed_again_are_listed_once(self, repository: Repository) -> None:
        image, _ = await push_image(repository, "app")
        first = await push_referrer(repository, image, "application/vnd.example.sbom")
        await push_referrer(repository, image, "application/vnd.example.sbom")
        assert digests(await repository.referrers(image.digest)) == digests([first])

    async def test_referrers_of_an_absent_manifest(self, repository: Repository) -> None:
        absent = described(b"absent", OCI_MANIFEST)
        referrer = await push_referrer(repository, absent, "application/vnd.example.sbom")
        assert digests(await repository.referrers(absent.digest)) == digests([referrer])

    async def test_referrers_pushed_at_once(self, repository: Repository) -> None:
        image, _ = await push_image(repository, "app")
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(
                    push_referrer, repository, image, "application/vnd.example.note", f"note {number}"
                )
        notes = [found.annotations["note"] for found in await repository.referrers(image.digest)]
        assert sorted(notes) == [f"note {number}" for number in range(5)]

    # The rest.

    async def test_names(self, repository: Repository, other_repository: Repository) -> None:
        descriptor = described(b"x")
        assert repository.name != other_repository.name
        assert repository.blob(descriptor).name.startswith(repository.name)
        assert str(descriptor.digest)[:19] in repository.blob(descriptor).name

    async def test_protocols(self, repository: Repository) -> None:
        assert isinstance(repository, Repository)
        assert isinstance(repository.blob(described(b"x")), BlobSource)
