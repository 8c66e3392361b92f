"""A reference unpacker: what an image's layers leave in a real directory. Slow, literal, and independent.

It shares nothing with veneer's own reading of tars: it reads with Python's tarfile and acts with system calls,
as root. It means to leave what containerd's overlayfs snapshots show when they are mounted on each other:

1. All whiteouts and opaque markers of a layer first remove what the layers below have.
2. Then the layer's entries are put in place in their order. Missing parents are made with default attributes.
3. At the very end directories get their times, and device nodes that are not wanted go.

It differs where veneer decides differently (see :mod:`veneer.index.build`): the root's entry counts, the
attributes in a hard link's header do not, and xattrs that would drive overlayfs are left out. It expects layers
that are not hostile.
"""

import errno
import io
import os
import shutil
import stat
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, cast

__all__ = ["unpack_layers"]

_XATTR: Final = "SCHILY.xattr."
_OVERLAY: Final = ("trusted.overlay.", "user.overlay.")
_NODE_TYPES: Final = {
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def unpack_layers(layers: Iterable[bytes], root: Path, devices: str = "drop") -> None:
    """Unpack uncompressed tars, lowest first, into the existing empty directory ``root``."""
    os.chown(root, 0, 0)
    root.chmod(0o755)
    times = {b"": 0}
    for layer in layers:
        _apply(layer, os.fsencode(root), times)
    for directory, names, files in os.walk(os.fsencode(root)):
        for name in (*names, *files):
            status = os.lstat(os.path.join(directory, name))
            device = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
            empty = stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
            if device and (devices == "drop" or empty):
                os.unlink(os.path.join(directory, name))
    for path, time in times.items():
        # A symlink may have come in the place of a parent since, and lead to another directory.
        if _is_reached(os.fsencode(root), path):
            os.utime(os.path.join(os.fsencode(root), path), ns=(time, time))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _parts(name: str) -> list[bytes]:
    return [part for part in _bytes(name).split(b"/") if part not in (b"", b".")]


def _real_directory(path: bytes) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _is_reached(root: bytes, path: bytes) -> bool:
    """Whether all of a relative path are directories."""
    parts = path.split(b"/")
    return all(_real_directory(os.path.join(root, *parts[:depth])) for depth in range(1, len(parts) + 1))


def _apply(layer: bytes, root: bytes, times: dict[bytes, int]) -> None:
    archive = tarfile.open(fileobj=io.BytesIO(layer), encoding="utf-8", errors="surrogateescape")  # noqa: SIM115 - in memory
    entries = [(_parts(member.name), member) for member in archive]
    for parts, _member in entries:
        if parts and parts[-1].startswith(b".wh."):
            _remove_below(root, parts)
    for parts, member in entries:
        _imply(root, parts[:-1], times)
        if not (parts and parts[-1].startswith(b".wh.")):
            _place(root, parts, member, layer, times)


def _remove(path: bytes) -> None:
    if _real_directory(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def _remove_below(root: bytes, parts: Sequence[bytes]) -> None:
    directory = root
    for part in parts[:-1]:
        directory = os.path.join(directory, part)
        if not _real_directory(directory):
            return
    if parts[-1] == b".wh..wh..opq":
        for name in os.listdir(directory):
            _remove(os.path.join(directory, name))
    elif not parts[-1].startswith(b".wh..wh."):
        _remove(os.path.join(directory, parts[-1].removeprefix(b".wh.")))


def _imply(root: bytes, parts: Sequence[bytes], times: dict[bytes, int]) -> None:
    """Make the directories that are not there."""
    for depth in range(1, len(parts) + 1):
        relative = b"/".join(parts[:depth])
        full = os.path.join(root, relative)
        if not _real_directory(full):
            _remove(full)
            os.mkdir(full)
            os.chown(full, 0, 0)  # a parent with the setgid bit gives its group
            os.chmod(full, 0o755)
            times[relative] = 0


def _place(
    root: bytes, parts: Sequence[bytes], member: tarfile.TarInfo, layer: bytes, times: dict[bytes, int]
) -> None:
    path = os.path.join(root, *parts)
    if member.isdir():
        if not _real_directory(path):
            _remove(path)
            os.mkdir(path)
        for name in os.listxattr(path):
            os.removexattr(path, name)
        times[b"/".join(parts)] = _mtime(member)
    else:
        _remove(path)
        if member.islnk():
            os.link(os.path.join(root, *_parts(member.linkname)), path, follow_symlinks=False)
            return
        if member.issym():
            os.symlink(_bytes(member.linkname), path)
        elif member.type in _NODE_TYPES:
            device = (
                os.makedev(member.devmajor, member.devminor) if member.isdev() and not member.isfifo() else 0
            )
            os.mknod(path, _NODE_TYPES[member.type] | 0o600, device)
        else:
            _write(path, member, layer)
    _describe(path, member)


def _write(path: bytes, member: tarfile.TarInfo, layer: bytes) -> None:
    with open(path, "wb") as file:
        place = member.offset_data
        # typeshed has no idea of this attribute's type.
        sparse = cast("list[tuple[int, int]] | None", member.sparse)
        for offset, length in [(0, member.size)] if sparse is None else sparse:
            file.seek(offset)
            file.write(layer[place : place + length])
            place += length
        file.truncate(member.size)


def _describe(path: bytes, member: tarfile.TarInfo) -> None:
    os.lchown(path, member.uid, member.gid)
    for key, value in member.pax_headers.items():
        name = key.removeprefix(_XATTR)
        if name == key or name.startswith(_OVERLAY):
            continue
        try:
            os.setxattr(path, _bytes(name), _bytes(value), follow_symlinks=False)
        except OSError as error:
            # As containerd: the kernel has user attributes on files and directories only, and knows namespaces.
            special = not (member.isfile() or member.isdir())
            if not (error.errno == errno.ENOTSUP or (error.errno == errno.EPERM and special)):
                raise
    if not member.issym():
        os.chmod(path, member.mode & 0o7777)
    time = _mtime(member)
    os.utime(path, ns=(time, time), follow_symlinks=False)


def _mtime(member: tarfile.TarInfo) -> int:
    """The exact time, which tarfile rounds."""
    text = member.pax_headers.get("mtime")
    if text is None:
        return int(member.mtime) * 1_000_000_000
    seconds, _, fraction = text.lstrip("-").partition(".")
    total = int(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, "0"))
    return -total if text.startswith("-") else total
