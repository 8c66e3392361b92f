"""Images in memory, and files of this machine as if they were an image."""

import os
import stat
from array import array
from collections.abc import Sequence
from pathlib import Path

from veneer.index.build import TreeBuilder
from veneer.index.merge import merge
from veneer.index.model import Codec, Device, ImageIndex, LayerIndex, SpanTable
from veneer.index.tar import TarParser
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER
from veneer.prefetch.profile import Profile
from veneer.prefetch.static.files import File, ImageFiles, ReadNode
from veneer.prefetch.static.start import Command, static_profile
from veneer.testing.tars import TarItem, tar

_RAW = (Codec("raw"),)


def image(*layers: Sequence[TarItem]) -> tuple[ImageIndex, ReadNode]:
    """The index of an image, lowest layer first, and what reads it."""
    tars = [tar(layer) for layer in layers]
    indexes = []
    for data in tars:
        parser, builder = TarParser(), TreeBuilder("drop")
        for entry in [*parser.feed(data), *parser.finish()]:
            builder.add(entry)
        digest = Digest.of(data)
        spans = SpanTable(array("q", [0, len(data)]), array("q", [0]), array("q", [len(data)]), bytes(32), _RAW)
        device = Device(Descriptor(OCI_LAYER, digest, len(data)), digest, spans, digest)
        indexes.append(LayerIndex(builder.finish(), device))
    index = merge(indexes)

    def read(node: int, offset: int, length: int) -> bytes:
        out = bytearray(length)
        for extent in index.extents(node, offset, length):
            data = tars[extent.device][extent.offset : extent.offset + extent.length]
            out[extent.file_offset - offset : extent.file_offset - offset + extent.length] = data
        return bytes(out)

    return index, read


def file(path: str, content: bytes = b"", *, mode: int = 0o644, mtime_s: int = 0) -> TarItem:
    return TarItem(path.encode(), content=content, mode=mode, mtime_ns=mtime_s * 1_000_000_000)


def program(path: str, content: bytes) -> TarItem:
    return file(path, content, mode=0o755)


def link(path: str, target: str) -> TarItem:
    return TarItem(path.encode(), "symlink", 0o777, link=target.encode())


def profile_of(
    layers: Sequence[Sequence[TarItem]], *words: str, env: Sequence[str] = (), directory: str = ""
) -> tuple[Profile, dict[str, int]]:
    """The static profile of a command, and how many bytes of each file it has."""
    index, read = image(*layers)
    profile = static_profile(index, read, Command.create(words, env, directory))
    return profile, files_of(index, profile)


def files_of(index: ImageIndex, profile: Profile) -> dict[str, int]:
    """How many bytes of each file a profile has, in the order of its uses."""
    found: dict[str, int] = {}
    for use in profile.uses:
        for path, node in index.walk():
            if not stat.S_ISREG(index.mode[node]) or not index.size[node]:
                continue
            for extent in index.extents(node):
                device = index.devices[extent.device]
                end = min(use.end, extent.offset + extent.length)
                if device.diff_id == use.layer and max(use.offset, extent.offset) < end:
                    name = path.decode()
                    found[name] = found.get(name, 0) + end - max(use.offset, extent.offset)
    return found


class HostFiles(ImageFiles):
    """A directory of this machine as if it were an image."""

    def __init__(self, root: Path) -> None:
        self.exhausted = False
        self.root = root
        self._real: dict[int, Path] = {}

    def _resolved(self, path: bytes) -> Path | None:
        done = Path("/")
        pending = [part for part in reversed(path.decode().split("/")) if part not in ("", ".")]
        for _ in range(200):
            if not pending:
                return self.root / done.relative_to("/")
            name = pending.pop()
            if name == "..":
                done = done.parent
                continue
            here = self.root / done.relative_to("/") / name
            if here.is_symlink():
                target = os.readlink(here)
                if target.startswith("/"):
                    done = Path("/")
                pending += [part for part in reversed(target.split("/")) if part not in ("", ".")]
            elif here.exists():
                done /= name
            else:
                return None
        return None

    def file(self, path: bytes) -> File | None:
        real = self._resolved(path)
        if real is None or not real.is_file():
            return None
        status = real.stat()
        self._real[status.st_ino] = real
        inside = os.fsencode(real.relative_to(self.root))
        executable = bool(status.st_mode & 0o111)
        return File(status.st_ino, inside, status.st_size, int(status.st_mtime), executable)

    def directory(self, path: bytes) -> bytes | None:
        real = self._resolved(path)
        return os.fsencode(real.relative_to(self.root)) if real is not None and real.is_dir() else None

    def names(self, path: bytes) -> Sequence[bytes]:
        real = self._resolved(path)
        return sorted(os.listdir(os.fsencode(real))) if real is not None and real.is_dir() else ()

    def read(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        with self._real[file.node].open("rb") as opened:
            opened.seek(offset)
            return opened.read(-1 if length is None else length)
