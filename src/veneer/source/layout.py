"""OCI image layouts on disk as repositories (image-spec, image-layout.md).

Tags are annotations in ``index.json``, manifests and blobs are files named by digest. Invariants: a blob has
its name only when its bytes were checked; ``index.json`` is replaced whole and under a lock; paths are made of
parsed digests only. Layouts of other tools are read as they come: symbolic links to blobs, entries without
annotations, members nobody knows.

Not for: removing anything. What a failed push leaves are complete blobs that the next try finds.
"""

import os
import stat
from pathlib import Path

import trio

from veneer.errors import IntegrityError, NotFound, RegistryError, UnsupportedFormat, UsageError
from veneer.events import Progress, Reporter, silent
from veneer.oci.canonical import canonical_json, parse_json
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import MAX_MANIFEST_SIZE, Index, Manifest, parse_manifest
from veneer.oci.mediatypes import INDEXES, MANIFESTS
from veneer.oci.reference import TAG
from veneer.source.base import BlobBody, RawManifest, Repository
from veneer.source.layout_file import (
    BlobWriter,
    FileBlob,
    is_staged,
    locked,
    os_errors,
    read_small,
    sweep,
    sync_directory,
    write_whole,
)
from veneer.source.layout_index import EMPTY_INDEX, LayoutIndex, referrers_tag

__all__ = ["FileBlob", "OCILayout"]

_VERSION_FILE = "oci-layout"
_VERSION = "1.0.0"
#: The file holds one short member.
_VERSION_FILE_LIMIT = 4_096
#: ``sha256:`` and 12 digits.
_SHORT_DIGEST = 19
_LOCK_FILE = ".veneer-lock"
_OWN_FILES = frozenset({_VERSION_FILE, _LOCK_FILE, "blobs", "index.json"})


class OCILayout:
    """One OCI layout as a :class:`~veneer.source.base.Repository`.

    Any number of tasks, objects and processes may use one layout at once. Nothing is touched before the first
    operation, and nothing is created before the first push.

    Args:
        path: directory of the layout.
        create: make it at the first push when it is not there.
        nested: make it also where other directories are, as when repositories of a registry nest.
    """

    def __init__(self, path: Path, *, create: bool = False, nested: bool = False) -> None:
        self._path = path
        self._create = create
        self._nested = nested
        self._ready = False

    @property
    def name(self) -> str:
        """As it is written in references."""
        return f"oci:{self._path}"

    async def resolve(self, reference: str) -> Descriptor:
        """The descriptor that a tag or digest names; "" names the only image there is.

        Raises UsageError for "" when there are several images, and lists their tags.
        """
        return (await self.manifest(reference)).descriptor

    async def manifest(self, reference: str) -> RawManifest:
        """The manifest or index that a tag, a digest or "" names (see :meth:`resolve`)."""
        return await trio.to_thread.run_sync(self._manifest, reference)

    async def tags(self) -> list[str]:
        """The tags of the layout, sorted."""
        return (await trio.to_thread.run_sync(self._index)).tags

    def blob(self, descriptor: Descriptor) -> FileBlob:
        """The blob; its file is looked for when it is read."""
        digest = descriptor.digest
        return FileBlob(self._blob_path(digest), self._blob_name(digest), descriptor.size)

    async def referrers(self, subject: Digest, artifact_type: str = "") -> list[Descriptor]:
        """Listed manifests, and those of the fallback tag's index, whose subject is the given one.

        Entries without a file are passed over (layouts may be sparse); a file that is not what its entry
        says is an IntegrityError.
        """
        found = await trio.to_thread.run_sync(self._referrers, subject)
        return [entry for entry in found if not artifact_type or entry.artifact_type == artifact_type]

    async def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether there is a file for the blob, of the right size."""
        return await trio.to_thread.run_sync(self._has_blob, descriptor)

    async def mount_blob(self, descriptor: Descriptor, origin: Repository) -> bool:
        """Take the blob from another layout: by hard link where that works, else by a checked copy.

        A hard link shares the file as it is, without reading it.
        """
        if not isinstance(origin, OCILayout):
            return False
        linked = await trio.to_thread.run_sync(self._link_blob, descriptor, origin)
        if linked is None:
            source = origin._blob_path(descriptor.digest)
            await self.push_blob(descriptor, lambda: source.open("rb"))
        return linked is not False

    async def push_blob(self, descriptor: Descriptor, body: BlobBody, report: Reporter = silent) -> None:
        """Store a blob; raises IntegrityError when its bytes do not match the descriptor."""
        if await self.has_blob(descriptor):
            return
        await trio.to_thread.run_sync(self._prepare)
        digest = descriptor.digest
        item, what = str(digest)[:_SHORT_DIGEST], f"{self._blob_name(digest)} was not stored"
        with os_errors(what):
            writer = await trio.to_thread.run_sync(BlobWriter, self._path, descriptor, what)
            try:
                with await trio.to_thread.run_sync(body) as stream:
                    while await trio.to_thread.run_sync(writer.take, stream):
                        if writer.written < descriptor.size:
                            report(Progress("push", item, writer.written, descriptor.size))
                await trio.to_thread.run_sync(writer.commit, self._blob_path(digest))
            finally:
                writer.discard()
        report(Progress("push", item, descriptor.size, descriptor.size))

    async def push_manifest(self, data: bytes, media_type: str, tag: str = "") -> Descriptor:
        """Store a manifest or index and list it in ``index.json``, under ``tag`` when one is given."""
        if tag and not TAG.fullmatch(tag):
            raise UsageError(f"invalid tag {tag!r}")
        descriptor = parse_manifest(data, media_type).descriptor
        await trio.to_thread.run_sync(self._push_manifest, descriptor, data, tag)
        return descriptor

    async def prepare(self) -> None:
        """Make the layout ready to be written to by other means than these methods; raises like a push."""
        await trio.to_thread.run_sync(self._prepare)

    async def aclose(self) -> None:
        """Nothing is held open."""
        await trio.lowlevel.checkpoint()

    # What follows blocks and runs in threads.

    def _blob_path(self, digest: Digest) -> Path:
        return self._path / "blobs" / digest.algorithm / digest.hex

    def _blob_name(self, digest: Digest) -> str:
        return f"{self.name}@{digest}"

    def _has_blob(self, descriptor: Descriptor) -> bool:
        try:
            status = self._blob_path(descriptor.digest).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise RegistryError(f"{self._blob_name(descriptor.digest)}: {error.strerror}") from error
        return stat.S_ISREG(status.st_mode) and status.st_size == descriptor.size

    def _check_version(self) -> None:
        path = self._path / _VERSION_FILE
        try:
            data = read_small(path, str(path), _VERSION_FILE_LIMIT)
        except NotFound as error:
            raise NotFound(
                f"{self._path} is not an OCI layout: it has no file {_VERSION_FILE}",
                hint="check the path, or push an image there first",
            ) from error
        document = parse_json(data, str(path), limit=_VERSION_FILE_LIMIT)
        version = document.get("imageLayoutVersion") if isinstance(document, dict) else None
        if not isinstance(version, str):
            raise IntegrityError(f"{path} does not state an imageLayoutVersion")
        if version != _VERSION:
            raise UnsupportedFormat(f"{path} states version {version[:20]!r}, only {_VERSION} can be read")

    def _index(self) -> LayoutIndex:
        self._check_version()
        path = self._path / "index.json"
        try:
            return LayoutIndex.parse(read_small(path, str(path), MAX_MANIFEST_SIZE), str(path))
        except NotFound as error:
            raise IntegrityError(f"{self.name} has no index.json") from error

    def _read_manifest(self, digest: Digest) -> bytes:
        name = self._blob_name(digest)
        data = read_small(self._blob_path(digest), name, MAX_MANIFEST_SIZE)
        digest.check(data, name)
        return data

    def _manifest(self, reference: str) -> RawManifest:
        index = self._index()
        try:
            digest = Digest.parse(reference)
        except UsageError:
            entry = self._tagged(index, reference) if reference else self._only(index)
        else:
            listed = index.listed(digest)
            if listed is None:
                return self._unlisted(digest)
            entry = listed
        data = self._read_manifest(entry.digest)
        if len(data) != entry.size:
            raise IntegrityError(
                f"{self._blob_name(entry.digest)} has {len(data)} bytes, index.json says {entry.size}"
            )
        return RawManifest(Descriptor(entry.media_type, entry.digest, entry.size), data)

    def _unlisted(self, digest: Digest) -> RawManifest:
        """A manifest that only another one names, such as an image of a multi-platform index."""
        name = self._blob_name(digest)
        with os_errors(name):
            size = self._blob_path(digest).stat().st_size
        if size > MAX_MANIFEST_SIZE:
            raise NotFound(f"{name} is a blob of {size} bytes, not a manifest")
        data = self._read_manifest(digest)
        try:
            media_type = parse_manifest(data, None).media_type
        except IntegrityError as error:
            raise NotFound(f"{name} is a blob, not a manifest: {error.message}") from error
        return RawManifest(Descriptor(media_type, digest, len(data)), data)

    def _tagged(self, index: LayoutIndex, tag: str) -> Descriptor:
        found = index.tagged(tag)
        if not found:
            raise NotFound(f"{self.name} has no tag {tag!r}", hint=_choices(index))
        if len(found) > 1:
            raise IntegrityError(
                f"{self.name} has {len(found)} manifests with the tag {tag!r}",
                hint=f"name one by digest, such as {self.name}@{found[-1].digest}",
            )
        return found[0]

    def _only(self, index: LayoutIndex) -> Descriptor:
        """The only image; referrers and the parts of listed indexes do not count."""
        parts: set[Digest] = set()
        attached: set[Digest] = set()
        images = index.images
        for entry in images if len(images) > 1 else ():
            parsed = self._parsed(entry.digest)
            if parsed is not None and parsed.subject is not None:
                attached.add(entry.digest)
            elif isinstance(parsed, Index):
                parts.update(part.digest for part in parsed.manifests)
        images = [entry for entry in images if entry.digest not in parts | attached]
        if not images:
            raise NotFound(f"{self.name} holds no image")
        if len(images) > 1:
            raise UsageError(f"{self.name} holds {len(images)} images", hint=_choices(index) or "name a digest")
        return images[0]

    def _parsed(self, digest: Digest) -> Manifest | Index | None:
        """A manifest that may be absent or of a kind that cannot be read; None for both."""
        try:
            data = self._read_manifest(digest)
        except NotFound:
            return None
        try:
            return parse_manifest(data, None)
        except (IntegrityError, UnsupportedFormat):  # the bytes are those of the digest, but no manifest
            return None

    def _referrers(self, subject: Digest) -> list[Descriptor]:
        index = self._index()
        candidates = [entry for entry in index.entries if entry.media_type in MANIFESTS + INDEXES]
        for entry in index.tagged(referrers_tag(subject)):
            fallback = self._parsed(entry.digest)
            if isinstance(fallback, Index):
                candidates.extend(fallback.manifests)
        found: dict[Digest, Descriptor] = {}
        for digest in dict.fromkeys(entry.digest for entry in candidates):
            parsed = self._parsed(digest)
            if parsed is not None and parsed.subject is not None and parsed.subject.digest == subject:
                found[digest] = parsed.referrer
        return list(found.values())

    def _prepare(self) -> None:
        """Make the layout ready to be written to, once for each object."""
        if self._ready:
            return
        with os_errors(f"cannot write {self.name}"):
            if not (self._path / _VERSION_FILE).exists() and self._create:
                self._initialise()
            self._check_version()
            sweep(self._path)
        self._ready = True

    def _initialise(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        names = [name for name in os.listdir(self._path) if name not in _OWN_FILES and not is_staged(name)]
        foreign = [name for name in names if not (self._nested and (self._path / name).is_dir())]
        if foreign:
            raise UsageError(
                f"{self._path} is not empty and not an OCI layout", hint="choose a new or empty directory"
            )
        with locked(self._path / _LOCK_FILE, self.name):
            (self._path / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
            sync_directory(self._path / "blobs")
            if not (self._path / "index.json").exists():
                write_whole(self._path, self._path / "index.json", EMPTY_INDEX)
            version = canonical_json({"imageLayoutVersion": _VERSION})
            write_whole(self._path, self._path / _VERSION_FILE, version)  # last: now it is a layout

    def _push_manifest(self, descriptor: Descriptor, data: bytes, tag: str) -> None:
        self._prepare()
        with os_errors(f"cannot write {self.name}"):
            write_whole(self._path, self._blob_path(descriptor.digest), data)
            with locked(self._path / _LOCK_FILE, self.name):
                changed = self._index().with_manifest(descriptor, tag)
                if changed is not None:
                    LayoutIndex.parse(changed, f"index.json of {self.name} with one entry more")
                    write_whole(self._path, self._path / "index.json", changed)

    def _link_blob(self, descriptor: Descriptor, origin: "OCILayout") -> bool | None:
        """True when the blob is here, False when ``origin`` has none, None when it must be copied."""
        if self._has_blob(descriptor):
            return True
        if not origin._has_blob(descriptor):
            return False
        self._prepare()
        target = self._blob_path(descriptor.digest)
        source = os.path.realpath(origin._blob_path(descriptor.digest))  # link(2) does not follow links
        try:
            os.link(source, target)
            sync_directory(target.parent)
        except OSError:  # another file system, no hard links there, a damaged file in the way: a copy tells
            return None
        return True


def _choices(index: LayoutIndex) -> str | None:
    tags = index.tags
    return f"it has the tags {', '.join(tags[:20])}{' ...' if len(tags) > 20 else ''}" if tags else None
