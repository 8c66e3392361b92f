"""Repositories of the embedded registry: OCI layouts in a tree of directories.

Repository ``a/b`` is the layout ``DIR/a/b``; when DIR is itself a layout, it is the only repository and has the
name of the directory. Invariant: no name leads to a path outside of DIR or into the inside of a layout.
Reading and pushing is :class:`~veneer.source.layout.OCILayout`'s work; added here is what only a registry does:
listing every tag, serving files by path, and removing.
"""

import os
from collections.abc import Callable
from pathlib import Path

import trio

from veneer.errors import UsageError
from veneer.oci.canonical import Json, canonical_json, parse_json
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import MAX_MANIFEST_SIZE
from veneer.oci.reference import TAG
from veneer.serve.api import REPOSITORY_NAME, APIError
from veneer.source.layout import OCILayout
from veneer.source.layout_file import locked, os_errors, read_small, write_whole
from veneer.source.layout_index import REF_NAME, LayoutIndex

__all__ = ["Storage", "StoredRepository"]

MAX_NAME = 255
#: Valid components of a name that are files or directories of a layout.
_LAYOUT_MEMBERS = frozenset({"blobs", "index.json", "oci-layout"})
#: The media type matters only to the descriptor that ``has_blob`` and ``mount_blob`` take.
_ANY_BLOB = "application/octet-stream"


class StoredRepository:
    """One repository. Any number of tasks may use one, or several objects for the same."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.layout = OCILayout(path, create=True, nested=True)

    def blob_path(self, digest: Digest) -> Path:
        """Where the blob is or will be."""
        return self.path / "blobs" / digest.algorithm / digest.hex

    def blob_size(self, digest: Digest) -> int | None:
        """Bytes of the blob, or None when it is not here."""
        path = self.blob_path(digest)
        try:
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None

    async def mount(self, digest: Digest, origin: "StoredRepository") -> bool:
        """Take a blob from another repository; False when that has none."""
        size = origin.blob_size(digest)
        return size is not None and await self.layout.mount_blob(
            Descriptor(_ANY_BLOB, digest, size), origin.layout
        )

    async def tags(self) -> list[str]:
        """All tags in lexical order, those of attachments included."""
        index = await trio.to_thread.run_sync(self._index)
        names = {entry.annotations.get(REF_NAME, "") for entry in index.entries}
        return sorted(name for name in names if TAG.fullmatch(name))

    async def remove_tag(self, tag: str) -> bool:
        """Take a tag away and leave the manifest; False when there is no such tag."""

        def untag(row: dict[str, Json]) -> dict[str, Json]:
            annotations = row.get("annotations")
            if not isinstance(annotations, dict) or annotations.get(REF_NAME) != tag:
                return row
            return {**row, "annotations": {k: v for k, v in annotations.items() if k != REF_NAME}}

        return await trio.to_thread.run_sync(self._edit_index, untag)

    async def remove_manifest(self, digest: Digest) -> bool:
        """Remove a manifest with all of its tags; False when it is not here."""

        def drop(row: dict[str, Json]) -> dict[str, Json] | None:
            return None if row.get("digest") == str(digest) else row

        listed = await trio.to_thread.run_sync(self._edit_index, drop)
        return await self.remove_blob(digest) or listed

    async def remove_blob(self, digest: Digest) -> bool:
        """Remove a blob; False when it is not here."""
        try:
            await trio.to_thread.run_sync(self.blob_path(digest).unlink)
        except FileNotFoundError:
            return False
        return True

    def _read_index(self) -> bytes:
        path = self.path / "index.json"
        return read_small(path, str(path), MAX_MANIFEST_SIZE)

    def _index(self) -> LayoutIndex:
        return LayoutIndex.parse(self._read_index(), str(self.path / "index.json"))

    def _edit_index(self, change: Callable[[dict[str, Json]], dict[str, Json] | None]) -> bool:
        """Rewrite the rows of index.json under its lock; whether anything changed."""
        with os_errors(f"cannot write {self.name}"), locked(self.path / ".veneer-lock", self.name):
            data = self._read_index()
            document = parse_json(data, "index.json", limit=MAX_MANIFEST_SIZE)
            assert isinstance(document, dict)
            rows = document.get("manifests")
            assert isinstance(rows, list)
            old = [row for row in rows if isinstance(row, dict)]
            new = [row for row in map(change, old) if row is not None]
            if new == old:
                return False
            write_whole(self.path, self.path / "index.json", canonical_json({**document, "manifests": new}))
            return True


class Storage:
    """All repositories under one directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._single = ""
        if (root / "oci-layout").is_file():
            self._single = root.resolve().name
            if not REPOSITORY_NAME.fullmatch(self._single):
                raise UsageError(
                    f"{root} is an OCI layout, but its name cannot be that of a repository",
                    hint="rename it in lower case, or serve the directory above",
                )

    def repository(self, name: str) -> StoredRepository:
        """The repository of that name, whether or not it exists. Raises APIError for impossible names."""
        if len(name) > MAX_NAME or not REPOSITORY_NAME.fullmatch(name):
            raise APIError("NAME_INVALID", f"invalid repository name {name[:MAX_NAME]!r}")
        parts = name.split("/")
        if _LAYOUT_MEMBERS.intersection(parts):
            raise APIError("NAME_INVALID", f"repository name {name!r} has a reserved component")
        if self._single:
            if name != self._single:
                raise APIError("NAME_UNKNOWN", f"the only repository here is {self._single!r}")
            return StoredRepository(name, self._root)
        return StoredRepository(name, self._root.joinpath(*parts))

    def existing(self, name: str) -> StoredRepository:
        """The repository of that name. Raises APIError when there is none."""
        repository = self.repository(name)
        if not (repository.path / "oci-layout").is_file():
            raise APIError("NAME_UNKNOWN", f"there is no repository {name!r}")
        return repository

    async def names(self) -> list[str]:
        """All repositories in lexical order."""
        return await trio.to_thread.run_sync(self._names)

    def _names(self) -> list[str]:
        if self._single:
            return [self._single]
        found = []
        for directory, subdirectories, files in os.walk(self._root):
            name = Path(directory).relative_to(self._root).as_posix()
            if "oci-layout" in files and REPOSITORY_NAME.fullmatch(name):
                found.append(name)
            subdirectories[:] = [s for s in subdirectories if s not in _LAYOUT_MEMBERS and s[0] != "."]
        return sorted(found)
