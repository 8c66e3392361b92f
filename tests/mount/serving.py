"""Mounting in the test's own process; the test must touch the mount from threads or other processes only."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from tests.mount.images import MemoryStore, digest
from veneer.index.model import ImageIndex
from veneer.mount.backends import Subject, open_mounter
from veneer.mount.base import Mounter
from veneer.mount.fuse import FuseStats
from veneer.mount.session import MountSession, mounted
from veneer.mount.upper import private_upper

T = TypeVar("T")


@dataclass
class Mounted:
    path: Path
    stats: FuseStats
    store: MemoryStore
    session: MountSession


async def mounter_of(index: ImageIndex, store: MemoryStore, directory: Path, backend: str = "fuse") -> Mounter:
    """A backend for an image; what it keeps on disk is below ``directory``."""
    identity = digest(os.urandom(16))  # no two trees of tests are known to be the same
    subject = Subject("test", index.devices, lambda: index, identity, store, list(range(len(store.devices))))
    return await open_mounter(backend, subject, cache_dir=directory / "cache", devices=directory / "devices")


@asynccontextmanager
async def serving(
    directory: Path, index: ImageIndex, data: bytes, *, overlay: bool = False, backend: str = "fuse"
) -> AsyncIterator[Mounted]:
    """An image of one device on ``directory/mnt``, with a writable layer if asked."""
    store = MemoryStore([data])
    mounter = await mounter_of(index, store, directory, backend)
    path, lower = directory / "mnt", directory / "lower"
    path.mkdir()
    lower.mkdir()
    upper = private_upper(directory / "upper") if overlay else None
    async with mounted(mounter, path, lower=lower if upper else None, upper=upper) as session:
        assert isinstance(mounter.stats, FuseStats)
        yield Mounted(path, mounter.stats, store, session)


async def in_thread(function: Callable[[], T]) -> T:
    """What may touch the mount."""
    return await trio.to_thread.run_sync(function)
