"""The documents of an image (manifests, config, index), from the local copy or else from the repository.

Every byte that leaves here has been checked against the digest that named it. Bytes that arrive damaged are
asked for once more, since connections and caches on the way damage them more often than registries do.
"""

from pathlib import Path

import trio

from veneer.errors import IntegrityError
from veneer.formats.local import DigestFiles
from veneer.image.tags import known_tag, note_tag
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import MAX_MANIFEST_SIZE
from veneer.source.base import Repository

__all__ = ["Contents"]

#: Times that damaged bytes are asked for in all.
ATTEMPTS = 2


class Contents:
    """The documents of one repository. May be used by many tasks.

    Args:
        repository: where they are.
        directory: where copies are kept, shared by all repositories; beside it, what tags named.
        background: for what is asked for ahead of its use; None: nothing is.

    Attributes:
        tagged: what the tag that was followed last names.
    """

    def __init__(self, repository: Repository, directory: Path, background: trio.Nursery | None = None) -> None:
        self.background = background
        self.tagged: Digest | None = None
        self._repository = repository
        self._local = DigestFiles(directory)
        self._tags = directory.with_name("tags")
        self._fetching: dict[Digest, trio.Lock] = {}

    @property
    def repository(self) -> Repository:
        """Where the documents are."""
        return self._repository

    async def named(self, reference: str) -> tuple[bytes, str]:
        """The manifest or index that a tag names now, and its media type. One request."""
        raw = await self._repository.manifest(reference)
        digest = raw.descriptor.digest

        def keep() -> None:
            self._local.save(digest, raw.data)
            note_tag(self._tags, self._repository.name, reference, digest)

        await trio.to_thread.run_sync(keep)
        self.tagged = digest
        return raw.data, raw.descriptor.media_type

    async def named_before(self, reference: str) -> bytes | None:
        """What a tag named when it was last asked for; None if that is not here. No request."""

        def known() -> tuple[Digest | None, bytes | None]:
            digest = known_tag(self._tags, self._repository.name, reference)
            return digest, None if digest is None else self._local.load(digest, MAX_MANIFEST_SIZE)

        self.tagged, data = await trio.to_thread.run_sync(known)
        return data

    async def manifest(self, descriptor: Descriptor, what: str) -> bytes:
        """A manifest or index by its descriptor."""
        if descriptor.size > MAX_MANIFEST_SIZE:
            raise IntegrityError(f"{what} of {descriptor.size} bytes, more than {MAX_MANIFEST_SIZE} allowed")
        data = await self.pinned(descriptor.digest)
        if len(data) != descriptor.size:
            raise IntegrityError(f"{what}: expected {descriptor.size} bytes, got {len(data)}")
        return data

    async def pinned(self, digest: Digest) -> bytes:
        """A manifest or index by its digest alone. No request when it is known."""
        if (data := await self._load(digest, MAX_MANIFEST_SIZE)) is not None:
            return data
        raw = await self._repository.manifest(str(digest))
        digest.check(raw.data, f"manifest of {self._repository.name}")
        await self._save(digest, raw.data)
        return raw.data

    async def fetch(self, descriptor: Descriptor, what: str, limit: int) -> bytes:
        """A whole blob of at most ``limit`` bytes; ``what`` names it in errors."""
        # Who asks at the same time asks once.
        async with self._fetching.setdefault(descriptor.digest, trio.Lock()):
            return await self._fetch(descriptor, what, limit)

    async def _fetch(self, descriptor: Descriptor, what: str, limit: int) -> bytes:
        if (data := await self.known(descriptor)) is not None:
            return data
        if descriptor.size > limit:
            raise IntegrityError(f"{what} has {descriptor.size} bytes, more than the {limit} allowed")
        for attempt in range(1, ATTEMPTS + 1):
            data = await self._repository.blob(descriptor).read(0, descriptor.size)
            try:
                descriptor.digest.check(data, what)
                break
            except IntegrityError:
                if attempt == ATTEMPTS:
                    raise
        assert data is not None  # the loop ends with data or raises
        await self.keep(descriptor, data)
        return data

    async def known(self, descriptor: Descriptor) -> bytes | None:
        """The blob if the local copy has it."""
        data = await self._load(descriptor.digest, descriptor.size)
        return data if data is not None and len(data) == descriptor.size else None

    async def keep(self, descriptor: Descriptor, data: bytes) -> None:
        """Put a checked blob into the local copy."""
        await self._save(descriptor.digest, data)

    async def _load(self, digest: Digest, limit: int) -> bytes | None:
        return await trio.to_thread.run_sync(self._local.load, digest, limit)

    async def _save(self, digest: Digest, data: bytes) -> None:
        await trio.to_thread.run_sync(self._local.save, digest, data)
