"""Into the destination: blobs first, then what refers to them, a tag at the very end.

So a conversion that fails leaves nothing that anybody can name; what it pushed is unreferenced and waits for
the next attempt or for the registry's garbage collection.
"""

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from veneer.convert.work import BlobFile
from veneer.errors import IntegrityError, RegistryError
from veneer.events import Notice, Reporter
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import build_manifest
from veneer.oci.mediatypes import EMPTY_JSON, OCI_MANIFEST, VENEER_INDEX_ARTIFACT
from veneer.source.base import BlobSource, Repository

__all__ = ["EMPTY_CONFIG", "Pusher", "download"]

EMPTY_CONFIG = b"{}"
#: Answers of registries that do not take artifacts of unknown types.
_REFUSALS = frozenset({400, 405, 406, 415, 422})


async def download(
    source: BlobSource, descriptor: Descriptor, path: Path, received: Callable[[int], None] = lambda _size: None
) -> None:
    """Write a blob to a file and check it; ``received`` is told of its bytes so far. Raises IntegrityError."""
    with BlobFile(path, descriptor.media_type, descriptor.digest.algorithm) as blob:
        size = 0
        async with source.stream() as chunks:
            async for chunk in chunks:
                await trio.to_thread.run_sync(blob.append, chunk)
                size += len(chunk)
                received(size)
        copied = blob.descriptor()
        if (copied.digest, copied.size) != (descriptor.digest, descriptor.size):
            raise IntegrityError(
                f"{source.name}: expected {descriptor.digest} of {descriptor.size} bytes, "
                f"got {copied.digest} of {copied.size} bytes"
            )


class Pusher:
    """Copies and pushes into one repository. May be used by many tasks.

    Args:
        origin: the repository of the source image.
        destination: where everything goes.
        directory: where blobs are kept on their way.
    """

    def __init__(self, origin: Repository, destination: Repository, directory: Path, report: Reporter) -> None:
        self._origin = origin
        self._destination = destination
        self._directory = directory
        self._report = report

    async def file(self, descriptor: Descriptor, path: Path) -> None:
        """Push a blob from a local file."""
        await self._destination.push_blob(descriptor, lambda: path.open("rb"), self._report)

    async def data(self, descriptor: Descriptor, data: bytes) -> None:
        """Push a small blob; taken over from the source if it is there too."""
        if not await self._destination.mount_blob(descriptor, self._origin):
            await self._destination.push_blob(descriptor, lambda: io.BytesIO(data))

    async def copy(self, descriptor: Descriptor) -> None:
        """Copy a blob of the source as it is, without a transfer where that is possible."""
        if await self._destination.mount_blob(descriptor, self._origin):
            return
        if await self._destination.has_blob(descriptor):
            return
        await trio.to_thread.run_sync(lambda: self._directory.mkdir(parents=True, exist_ok=True))
        with tempfile.TemporaryDirectory(prefix="copy-", dir=self._directory) as directory:
            path = Path(directory) / "blob"
            await download(self._origin.blob(descriptor), descriptor, path)
            await self.file(descriptor, path)

    async def artifact(
        self, blobs: Sequence[Descriptor], subject: Descriptor, artifact_type: str = VENEER_INDEX_ARTIFACT
    ) -> None:
        """Push the small manifest that makes blobs, such as the index, referrers of the image.

        A registry that refuses it costs nothing but garbage collection's knowledge of the blobs, since the
        image's annotations name them as well.
        """
        config = Descriptor(EMPTY_JSON, Digest.of(EMPTY_CONFIG), len(EMPTY_CONFIG))
        data = build_manifest(config, blobs, subject=subject, artifact_type=artifact_type)
        try:
            await self.data(config, EMPTY_CONFIG)
            await self._destination.push_manifest(data, OCI_MANIFEST)
        except RegistryError as error:
            if error.status not in _REFUSALS:
                raise
            self._report(
                Notice(f"{self._destination.name} takes no artifact of type {artifact_type}: {error.message}")
            )

    async def manifest(self, data: bytes, media_type: str, tag: str = "") -> Descriptor:
        """Push a manifest or index, under ``tag`` if one is given."""
        return await self._destination.push_manifest(data, media_type, tag)
