"""Having the kernel read what a pack holds of each file into its page cache, before the program asks for it.

While a start reads from its pack, the kernel reads ahead next to nothing (:mod:`veneer.mount.packed`), so that
each page of a mapped file is a read of its own. The runtime needs some tens of milliseconds before a program
runs: by then, all that it will read can be there.

It is a help and nothing that mounts depend on: what fails is read when somebody asks for it.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from veneer.index.model import Extent, ImageIndex
from veneer.index.paths import paths_to

__all__ = ["HotFile", "hot_files", "read_in"]

log = logging.getLogger(__name__)

#: Of a longer request, the kernel reads only so much.
_STEP = 128 << 10


class HotFile(NamedTuple):
    """Parts of a file that packs have: its path from the root, and where they begin and how long they are."""

    path: bytes
    ranges: Sequence[tuple[int, int]]


def hot_files(index: ImageIndex, placed: Mapping[int, Sequence[Extent]]) -> tuple[HotFile, ...]:
    """What packs have of files, in the order in which packs have it.

    Args:
        index: the tree.
        placed: file -> its extents; packs are the devices behind those of ``index``.
    """
    first = len(index.devices)
    files: list[tuple[int, int, int, list[tuple[int, int]]]] = []
    for node, extents in placed.items():
        parts = [extent for extent in extents if extent.device >= first]
        if parts:
            begins = min((part.device, part.offset) for part in parts)
            files.append((*begins, node, _joined(parts)))
    files.sort()
    paths = paths_to(index, (node for _, _, node, _ in files))
    return tuple(HotFile(paths[node], ranges) for _, _, node, ranges in files if node in paths)


def _joined(parts: Iterable[Extent]) -> list[tuple[int, int]]:
    """Ranges of a file, of parts in its order; those that touch are one."""
    ranges: list[tuple[int, int]] = []
    for start, _, _, length in parts:
        if ranges and sum(ranges[-1]) == start:
            ranges[-1] = ranges[-1][0], ranges[-1][1] + length
        else:
            ranges.append((start, length))
    return ranges


def read_in(root: Path, files: Iterable[HotFile]) -> None:
    """Have the kernel read parts of files below ``root``, where they are mounted. Blocks until it has."""
    try:
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        log.info("%s is not read ahead cause=%r", root, error.strerror)
        return
    try:
        for path, ranges in files:
            _read_file(directory, path, ranges)
    except OSError as error:
        # It is not there any more, or somebody has mounted something else on it.
        log.info("not all of %s is read ahead cause=%r", root, error.strerror)
    finally:
        os.close(directory)


def _read_file(root: int, path: bytes, ranges: Iterable[tuple[int, int]]) -> None:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root)
    try:
        for start, length in ranges:
            for at in range(start, start + length, _STEP):
                os.posix_fadvise(file, at, min(_STEP, start + length - at), os.POSIX_FADV_WILLNEED)
    finally:
        os.close(file)
