"""Layers of the lab's images: what a root file system has on top of another, and files that are made up.

Equal input gives equal bytes: entries keep the order of the tar that they are from, times are those of the
input or :data:`EPOCH`, and gzip gets no time of its own. Device nodes stay as they are.

Whoever makes a root file system gives no file a later time than :data:`EPOCH`, but Python's compiled modules
have the time that their source had before. They get the new one: otherwise every start in the image would
compile all that it imports, which in images of the world it does not.
"""

import hashlib
import io
import random
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from veneer.lab.imageset import SYNTHETIC_FILE
from veneer.oci.digest import Digest

__all__ = ["EPOCH", "StoredLayer", "app_layer", "compress", "difference", "survey"]

#: Seconds: the time of everything that has none of its own (SOURCE_DATE_EPOCH).
EPOCH = 1_700_000_000
_CHUNK = 1 << 20
#: What registries' layers are mostly compressed with.
_GZIP_LEVEL = 6
_WHITEOUT = ".wh."

#: Of a compiled module: version, flags (0: it goes by its source's time), that time, and the source's size.
_COMPILED = struct.Struct("<4sIII")

#: What makes an entry the same as another: header and content.
Survey = Mapping[str, tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer as it is stored: gzip in ``path``, a tar of ``size`` bytes that ``diff_id`` is the digest of."""

    path: Path
    digest: Digest
    stored: int
    diff_id: Digest
    size: int


def survey(tar: Path) -> Survey:
    """What a root file system's tar has, by name. Blocks, and reads all of it."""
    with tarfile.open(tar) as source:
        members = {_name(entry): entry for entry in source}
        return {name: _key(entry, _content(source, members, entry)) for name, entry in members.items()}


def difference(base: Survey, full: Path, layer: Path, *, removed: Iterable[str] = ()) -> int:
    """Write what ``full`` has on top of ``base`` as a layer, with whiteouts for what it has not.

    Args:
        base: of the layers below.
        full: tar of a whole root file system.
        layer: tar to write.
        removed: left out, with everything below.

    Returns:
        How many entries the layer has. Blocks.
    """
    gone, count = dict.fromkeys(base), 0
    unwanted = tuple(removed)
    written: set[str] = set()
    with tarfile.open(full) as source, tarfile.open(layer, "w", format=tarfile.PAX_FORMAT) as target:
        members = {_name(entry): entry for entry in source}
        for name, entry in members.items():
            if any(name == path or name.startswith(f"{path}/") for path in unwanted):
                continue
            gone.pop(name, None)
            content = _content(source, members, entry)
            if base.get(name) == _key(entry, content):
                continue
            if entry.islnk() and _clean(entry.linkname) not in written:
                # The other name is of the layer below, and links do not reach there.
                entry, itself = copy(members[_clean(entry.linkname)]), entry
                entry.name = itself.name
                content = _content(source, members, entry)
            written.add(name)
            target.addfile(entry, None if content is None else io.BytesIO(content))
            count += 1
        for name in gone:
            parent, _, last = name.rpartition("/")
            if parent not in gone:
                target.addfile(_plain(f"{parent}/{_WHITEOUT}{last}".lstrip("/"), 0))
                count += 1
    return count


def app_layer(layer: Path, files: Mapping[str, bytes], synthetic: int) -> None:
    """Write a layer of given files, with ``synthetic`` files of made-up bytes in ``data``. Blocks."""
    directories = {"data"} if synthetic else set()
    for path in files:
        parts = path.split("/")[:-1]
        directories |= {"/".join(parts[: i + 1]) for i in range(len(parts))}
    with tarfile.open(layer, "w", format=tarfile.PAX_FORMAT) as target:
        for path in sorted(directories):
            entry = _plain(path, 0)
            entry.type = tarfile.DIRTYPE
            target.addfile(entry)
        for path, content in sorted(files.items()):
            target.addfile(_plain(path, len(content)), io.BytesIO(content))
        for number in range(synthetic):
            target.addfile(_plain(f"data/{number:02x}", SYNTHETIC_FILE), io.BytesIO(_made_up(number)))


def compress(tar: Path, out: Path) -> StoredLayer:
    """Store a layer as gzip, without a time in it. Blocks."""
    plain, stored = hashlib.sha256(), hashlib.sha256()
    size = written = 0
    deflate = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 31)
    with tar.open("rb") as source, out.open("wb") as target:
        for piece in _pieces(source):
            plain.update(piece)
            size += len(piece)
            data = deflate.compress(piece) if piece else deflate.flush()
            stored.update(data)
            written += target.write(data)
    return StoredLayer(
        out, Digest("sha256", stored.hexdigest()), written, Digest("sha256", plain.hexdigest()), size
    )


def _pieces(source: BinaryIO) -> Iterator[bytes]:
    """All bytes, and then none once."""
    while True:
        piece = source.read(_CHUNK)
        yield piece
        if not piece:
            return


def _name(entry: tarfile.TarInfo) -> str:
    return _clean(entry.name)


def _clean(name: str) -> str:
    return name.removeprefix("./").strip("/")


def _key(entry: tarfile.TarInfo, content: bytes | None) -> tuple[object, ...]:
    header = (entry.type, entry.mode, entry.uid, entry.gid, entry.mtime, entry.linkname, entry.size)
    device = (entry.devmajor, entry.devminor, tuple(sorted(entry.pax_headers.items())))
    return (*header, *device, hashlib.sha256(content or b"").digest())


def _content(
    source: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], entry: tarfile.TarInfo
) -> bytes | None:
    """The bytes of a regular file; of a compiled module, with the time that its source has in the tar."""
    file = source.extractfile(entry) if entry.isreg() else None
    if file is None:
        return None
    content = file.read()
    directory, _, name = _name(entry).rpartition("/__pycache__/")
    if not name.endswith(".pyc") or len(content) < _COMPILED.size:
        return content
    version, flags, _, size = _COMPILED.unpack_from(content)
    module = members.get(f"{directory}/{name.partition('.')[0]}.py")
    if module is None or flags or module.size != size:
        return content
    return _COMPILED.pack(version, flags, int(module.mtime), size) + content[_COMPILED.size :]


def _plain(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    # Some are programs, and it does no harm to others.
    entry.size, entry.mtime, entry.mode = size, EPOCH, 0o755
    return entry


def _made_up(seed: int) -> bytes:
    """Bytes that gzip makes a third of: words drawn from a few thousand, like text and code."""
    source = random.Random(seed)
    words = [source.randbytes(source.randint(2, 12)) for _ in range(4096)]
    out = bytearray()
    while len(out) < SYNTHETIC_FILE:
        out += b"".join(source.choices(words, k=4096))
    return bytes(out[:SYNTHETIC_FILE])
