"""How the daemon stands: what ``veneer status`` tells of it and of its mounts.

A command asks in one of two ways: for the facts (``status``), which it joins with those of mounts that have a
process of their own; or, where there are none of these, for what is to be printed (``show``), so that it need
not import what it takes to print it.
"""

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from veneer import __version__
from veneer.daemon.control import Operation
from veneer.daemon.mounts import Listing, MountStatus, status_json
from veneer.daemon.residents import Residents
from veneer.errors import UsageError
from veneer.mount.resident import Guards
from veneer.mount.state import mount_records

__all__ = ["ReadStatus", "Render", "Standing"]

#: What a ``veneer status`` prints.
Render = Callable[[Listing], str]
#: The words and the environment of a ``veneer status`` to the run directory that it is about and to what it
#: prints; None for what only the command can do.
ReadStatus = Callable[[Sequence[str], Mapping[str, str]], tuple[Path, Render] | None]


class Standing:
    """Answers who asks. Belongs to the worker's event loop.

    Args:
        run_dir: of the daemon.
        log_file: where it logs to.
        read_status: reads command lines of ``veneer status``.

    Attributes:
        residents: the mounts, once they are served.
        guards: of their devices.
    """

    def __init__(self, run_dir: Path, log_file: Path, read_status: ReadStatus) -> None:
        self.residents: Residents | None = None
        self.guards: Guards | None = None
        self._run_dir = run_dir
        self._log_file = log_file
        self._read_status = read_status
        self._began = time.time()

    def operations(self) -> Mapping[str, Operation]:
        """The operations of the control socket."""
        return {"status": self._status, "show": self._show, "ping": self._ping}

    async def _ping(self, _request: dict[str, object]) -> dict[str, object]:
        await self._settle()
        return {"type": "pong", "worker": os.getpid(), "version": __version__}

    async def _settle(self) -> None:
        """Who asks after a container has ended is not to see its mount any more."""
        if self.residents is not None:
            await self.residents.settle()

    async def _status(self, _request: dict[str, object]) -> dict[str, object]:
        await self._settle()
        services = self.residents.services.values() if self.residents else ()
        mounts = [status_json(service.place.record, service.report()) for service in services]
        return {"type": "status", "daemon": self._daemon(), "mounts": mounts}

    async def _show(self, request: dict[str, object]) -> dict[str, object]:
        words, environ = request.get("words"), request.get("environ")
        if not isinstance(words, list) or not isinstance(environ, dict):
            raise UsageError("the request has no words, or no environment")
        read = self._read_status([str(word) for word in words], {k: str(v) for k, v in environ.items()})
        if read is None or read[0] != self._run_dir:
            return {"type": "elsewhere"}
        await self._settle()
        records = await trio.to_thread.run_sync(mount_records, self._run_dir)
        if not all(record.daemon for record in records):
            # The processes of these have to be asked, and cleaned up after, where they were mounted.
            return {"type": "elsewhere"}
        services = self.residents.services if self.residents else {}
        reports = {name: service.report() for name, service in services.items()}
        mounts = [MountStatus(record, reports.get(record.id)) for record in records]
        return {"type": "shown", "text": read[1](Listing(mounts, self._daemon()))}

    def _daemon(self) -> dict[str, Any]:
        guards = self.guards
        services = self.residents.services if self.residents else {}
        holdings = self.residents and self.residents.holdings
        stores = holdings.stores if holdings else {}
        decoder = holdings and holdings.decoder.pid
        return {
            "version": __version__,
            "worker": os.getpid(),
            "uptime_s": round(time.time() - self._began, 1),
            "log": os.fspath(self._log_file),
            "mounts": len(services),
            "trees": self.residents.trees.to_json() if self.residents else [],
            "descriptors": len(os.listdir("/proc/self/fd")),
            "descriptors_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "memory": sum(_memory(pid) for pid in (os.getpid(), guards and guards.scribe.pid, decoder) if pid),
            "decoder": decoder,
            "events": guards.devices.stats.to_json() if guards else {},
            "links": {path: store.links() for path, store in stores.items()},
            "stores": {path: store.stats.to_json() for path, store in stores.items()},
        }


def _memory(pid: int) -> int:
    """Resident bytes of a process; 0 if it has just ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
