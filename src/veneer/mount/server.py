"""The process's one FUSE session: from the mount to its end.

pyfuse3 serves one file system per process, so there is at most one session at a time. The event loop never
touches its own mount: every system call on it goes through a thread, because answering it is the loop's own
work.
"""

import logging
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pyfuse3

from veneer.errors import MountError
from veneer.mount.access import check_fuse, fuse_options, others_allowed
from veneer.source.tasks import open_nursery

__all__ = ["MAX_TASKS", "serve_fuse"]

log = logging.getLogger(__name__)

#: Requests served at once. Cold reads wait for the network here, and one more request than this would make
#: a look-up wait behind them; each costs one coroutine and a few touched pages of its buffer.
MAX_TASKS = 512


@asynccontextmanager
async def serve_fuse(
    operations: pyfuse3.Operations, target: Path, gone: Callable[[], None]
) -> AsyncIterator[None]:
    """Serve a file system on ``target`` within the context.

    Leaving the context cuts off whoever is still there; it does not unmount.

    Args:
        operations: what answers requests.
        target: an existing directory.
        gone: called when nobody can reach the file system any more.

    Raises:
        MountError: this machine or user cannot mount, or not there.
    """

    async def serve() -> None:
        try:
            await pyfuse3.main(max_tasks=MAX_TASKS)
        except* ConnectionAbortedError:
            log.warning("the connection to the kernel was aborted: whoever uses the mount gets errors")
        gone()

    _initialise(operations, target)
    try:
        async with open_nursery() as nursery:
            nursery.start_soon(serve)
            yield
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)


def _initialise(operations: pyfuse3.Operations, target: Path) -> None:
    check_fuse()
    root = os.geteuid() == 0
    said: list[str] = []
    try:
        with _captured_stderr(said):
            pyfuse3.init(operations, str(target), fuse_options(root=root, allow_other=others_allowed()))
    except RuntimeError as error:
        reason = "; ".join(said) or str(error)
        raise MountError(f"cannot mount on {target}: {reason}", hint="run veneer doctor") from error


@contextmanager
def _captured_stderr(lines: list[str]) -> Iterator[None]:
    """What C code writes to file descriptor 2, which is the only place where libfuse says why it failed."""
    saved = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(saved, 2)
                file.seek(0)
                lines += filter(None, file.read().decode(errors="replace").split("\n"))
    finally:
        os.close(saved)
