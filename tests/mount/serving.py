"""Mounting in the test's own process; the test must touch the mount from threads or other processes only."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from tests.mount.images import MemoryStore
from veneer.index.model import ImageIndex
from veneer.mount.fuse import TreeOperations
from veneer.mount.overlay import private_upper
from veneer.mount.session import MountSession, mounted

T = TypeVar("T")


@dataclass
class Mounted:
    path: Path
    operations: TreeOperations[int]
    store: MemoryStore
    session: MountSession


@asynccontextmanager
async def serving(
    directory: Path, index: ImageIndex, data: bytes, *, overlay: bool = False
) -> AsyncIterator[Mounted]:
    """An image of one device on ``directory/mnt``, with a writable layer if asked."""
    store = MemoryStore([data])
    operations = TreeOperations(index, store, [0], image="test")
    path, lower = directory / "mnt", directory / "lower"
    path.mkdir()
    lower.mkdir()
    upper = private_upper(directory / "upper") if overlay else None
    async with mounted(operations, path, lower=lower if upper else None, upper=upper) as session:
        yield Mounted(path, operations, store, session)


async def in_thread(function: Callable[[], T]) -> T:
    """What may touch the mount."""
    return await trio.to_thread.run_sync(function)
