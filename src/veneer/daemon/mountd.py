"""The process of one mount: ``python -m veneer.daemon.mountd``, with a request on its standard input.

Started in a session of its own (:mod:`veneer.daemon.spawn`), it says on standard output that the mount is
ready or why it cannot be (:mod:`veneer.daemon.request`), then cuts itself off from whoever started it and
writes to its log only.

Invariant: exactly one ``ready`` or ``error`` line, whatever happens.
"""

import json
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import trio

from veneer.daemon.failure import error_to_json
from veneer.daemon.request import MountInfo, MountRequest
from veneer.daemon.service import serve_mount
from veneer.daemon.telling import Telling
from veneer.errors import VeneerError
from veneer.events import Event, Notice
from veneer.source.tasks import open_nursery

__all__ = ["main"]

log = logging.getLogger(__name__)

_FORMAT = "ts=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"


class _Parent:
    """The pipes to whoever started this process; silent once the mount is ready or has failed."""

    def __init__(self) -> None:
        self._open = True
        self._lifeline = os.dup(0)
        self._telling = Telling(self._send)

    async def watch(self, scope: trio.CancelScope) -> None:
        """Give up when the parent closes its end before the mount is ready: nobody would know of it."""
        await trio.lowlevel.wait_readable(self._lifeline)
        os.close(self._lifeline)
        if self._open:
            log.warning("whoever asked for the mount has gone")
            self._let_go()
            scope.cancel()

    def report(self, event: Event) -> None:
        """Pass an event on."""
        if isinstance(event, Notice):
            log.info("notice message=%r", event.message)
        self._telling(event)

    def ready(self, info: MountInfo) -> None:
        """Say that the mount is up, and let go."""
        log.info(
            "mounted image=%s digest=%s mountpoint=%r backend=%s reason=%r",
            info.image,
            info.digest,
            info.mountpoint,
            info.backend,
            info.backend_reason,
        )
        self._send({"type": "ready", **info.to_json()})
        self._let_go()

    def failed(self, error: VeneerError) -> None:
        """Say why there is no mount. Without anybody to tell, the log has to do."""
        log.error("failed error=%s cause=%r", type(error).__name__, error.message)
        self._send(error_to_json(error))
        self._let_go()

    def _send(self, message: dict[str, object]) -> None:
        if self._open:
            # A parent that has gone is noticed by watch().
            with suppress(BrokenPipeError):
                os.write(1, json.dumps(message).encode() + b"\n")

    def _let_go(self) -> None:
        if self._open:
            self._open = False
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.close(null)


def main() -> int:
    """Serve one mount until it ends."""
    request = MountRequest.from_json(json.loads(sys.stdin.buffer.readline()))
    if os.fork():
        # The parent waits for this process only; the mount's own is adopted and reaped by init.
        os._exit(0)
    os.chdir("/")
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(level=logging.INFO, format=_FORMAT)
    parent = _Parent()

    async def serve() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(parent.watch, nursery.cancel_scope)
            await serve_mount(request, parent.ready, claimed=_log_to, report=parent.report)
            nursery.cancel_scope.cancel()

    try:
        trio.run(serve)
    except VeneerError as error:
        parent.failed(error)
        return error.exit_code
    except BaseException as error:
        log.exception("bug")
        parent.failed(VeneerError(f"internal error: {error!r}", hint="please report this"))
        raise
    return 0


def _log_to(directory: Path) -> None:
    """Send the log, and whatever else is written to standard error, to a file from now on."""
    fd = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(fd, 2)
    os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
