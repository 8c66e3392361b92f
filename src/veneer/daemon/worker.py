"""The daemon's worker, which :mod:`veneer.daemon.supervisor` starts as ``python -m veneer.cli.worker``.

It serves the kernel's questions and the control socket, both of which it inherits, so that neither notices when
one worker takes the place of another. It says ``ready`` to its supervisor once everything that was mounted is
served again, and ``alive`` as long as its event loop turns.

Ends with 0 when it was told to stop and nothing is mounted any more, and with :data:`RESTART` when another
worker is to go on.
"""

import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import trio

from veneer.container.runtime import find_runtime
from veneer.daemon.arguments import Arguments
from veneer.daemon.client import RunResult
from veneer.daemon.control import Operation, serve_control
from veneer.daemon.failure import error_to_json
from veneer.daemon.handover import start_adopting_supervisor
from veneer.daemon.one import Service, stopped
from veneer.daemon.request import RESIDENT, MountInfo, MountRequest, ShortRun
from veneer.daemon.residents import Residents
from veneer.daemon.standing import ReadStatus, Standing
from veneer.daemon.telling import Tell, Telling
from veneer.errors import MountError, UsageError, VeneerError
from veneer.mount.backends import choose_for_daemon
from veneer.mount.base import Choice
from veneer.mount.fanotify import raise_descriptor_limit
from veneer.mount.precontent import GuardedDevices
from veneer.mount.resident import Guards
from veneer.mount.state import process_of
from veneer.mount.superblocks import Superblocks
from veneer.mount.watch import MountTableWatch
from veneer.source.tasks import open_nursery
from veneer.transport.tls import tls_context

__all__ = ["RESTART", "ReadRun", "main"]

log = logging.getLogger(__name__)

_FORMAT = "ts=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
#: Exit status that asks the supervisor for another worker.
RESTART = 75
#: How often the supervisor hears of us; it waits many times as long.
ALIVE_S = 5.0
#: Before a restart, readers that wait get their bytes if they come within this time.
DRAIN_S = 5.0
ADOPT_RETRY_S = 1.0
#: Decoding a tree keeps the interpreter for tens of milliseconds. The event loop and the threads that verify
#: and write must not wait the usual 5 ms each time they want it back.
SWITCH_S = 0.0005

#: The words and the environment of a ``veneer run`` to what it asks for; None for what only the command can do.
ReadRun = Callable[[Sequence[str], Mapping[str, str]], ShortRun | None]
#: How long cleaning up after what has been unmounted may take before an unmount is answered.
CLEAN_S = 20.0


class Worker:
    """One run of the worker.

    Args:
        arguments: what it serves.
        read_run: reads command lines of ``veneer run``.
        read_status: reads command lines of ``veneer status``.
    """

    def __init__(self, arguments: Arguments, read_run: ReadRun, read_status: ReadStatus) -> None:
        self._arguments = arguments
        self._read_run = read_run
        self._supervisor = trio.socket.from_stdlib_socket(socket.socket(fileno=arguments.supervisor))
        self._log_file = arguments.run_dir / "daemon.log"
        self._standing = Standing(arguments.run_dir, self._log_file, read_status)
        self._residents: Residents | None = None
        self._guards: Guards | None = None
        self._stopping = self._handing_over = False
        #: What worked for a cache directory, which is not tried again.
        self._chosen: dict[tuple[str, Path], Choice] = {}

    async def run(self) -> None:
        """Serve until told to stop."""
        arguments = self._arguments
        async with open_nursery() as nursery:
            # First, so that whoever asks for an end while we begin is heard.
            nursery.start_soon(_vital, partial(self._follow_signals, nursery))
            nursery.start_soon(_vital, self._stay_alive)
            if arguments.group is not None:
                await self._take_over(nursery, arguments.group)
            listening = socket.socket(fileno=arguments.listener)
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
            nursery.start_soon(_vital, partial(self._serve, listener))
            await self._tell({"type": "ready"})
            if self._guards is not None:
                nursery.start_soon(self._guards.scribe.start)
                # Reading the system's certificates takes longer than a mount.
                nursery.start_soon(trio.to_thread.run_sync, tls_context, None)
            nursery.start_soon(_vital, self._follow_supervisor)
            if arguments.idle_exit != "none":
                await self._until_idle(float(arguments.idle_exit))
                log.info("ending: nothing has been mounted for %s s", arguments.idle_exit)
                nursery.cancel_scope.cancel()

    async def _take_over(self, nursery: trio.Nursery, group: int) -> None:
        """Serve everything that an earlier worker served."""
        arguments = self._arguments
        devices, superblocks = GuardedDevices(group, restoring=True), Superblocks()
        watch = MountTableWatch()
        for serve in (devices.serve, superblocks.serve, watch.serve):
            await nursery.start(partial(_vital, serve))
        self._guards = Guards(devices, superblocks, unguarded=arguments.fresh_group)
        residents = self._residents = Residents(arguments.run_dir, nursery, self._guards, watch, self._log_file)
        self._standing.guards, self._standing.residents = self._guards, residents
        await residents.restoring.restore()
        devices.restored()

    async def _serve(self, listener: trio.SocketListener) -> None:
        await serve_control(listener, self._operations(), for_client={"mount": self._mount, "run": self._run})

    def _operations(self) -> Mapping[str, Operation]:
        return {
            "let_go": self._let_go,
            "recorded": self._recorded,
            "timing": self._timing,
            "ended": self._ended,
            "stop": self._unmount,
            **self._standing.operations(),
        }

    async def _mount(self, request: dict[str, object], tell: Tell) -> dict[str, object]:
        info = await self._make(MountRequest.from_json(_object(request, "request")), tell)
        if isinstance(info, MountInfo):
            return {"type": "ready", "info": info.to_json()}
        return {"type": "elsewhere", "backend": info.backend, "reason": info.reason}

    async def _run(self, request: dict[str, object], tell: Tell) -> dict[str, object]:
        """A container's root for who has sent a command line and is about to become its runtime."""
        words, environ, pid = request.get("words"), _object(request, "environ"), request.get("pid")
        if not isinstance(words, list) or not isinstance(pid, int):
            raise UsageError("the request has no words, or no process")
        read = self._read_run([str(word) for word in words], {k: str(v) for k, v in environ.items()})
        if read is None:
            return {"type": "elsewhere"}
        wanted, settings = read.request, read.settings
        if settings.backend not in RESIDENT or settings.run_dir != self._arguments.run_dir:
            return {"type": "elsewhere"}
        runtime = find_runtime(wanted.runtime, str(environ.get("PATH", "")) or None)
        info = await self._make(wanted.mount(settings, runtime, process_of(pid)), tell)
        if not isinstance(info, MountInfo):
            return {"type": "elsewhere"}
        return {
            "type": "execute",
            "runtime": os.fspath(runtime),
            "id": info.id,
            "bundle": info.bundle,
            "interactive": wanted.options.interactive,
            "report": read.report and os.fspath(read.report),
        }

    async def _make(self, wanted: MountRequest, tell: Tell) -> MountInfo | Choice:
        """A mount, or how else to make it. What is to be said meanwhile is told."""
        if self._handing_over:
            # Whoever asks finds that we have gone, and asks the next worker.
            await trio.sleep_forever()
        if self._stopping:
            raise MountError("the daemon is being stopped", hint="try again in a moment")
        if self._residents is None:
            return Choice("auto", "the daemon has no fanotify group; see its log")
        what = wanted.settings.backend, wanted.settings.cache_dir
        choice = self._chosen.get(what)
        if choice is None:
            choice = await trio.to_thread.run_sync(choose_for_daemon, *what)
        if choice.backend != "erofs-fanotify":
            return choice
        self._chosen[what] = choice
        return await self._residents.mount(wanted, choice, Telling(tell))

    def _mounted(self, request: dict[str, object]) -> tuple[Residents, Service]:
        residents = self._residents
        service = residents.services.get(str(request.get("id"))) if residents else None
        if residents is None or service is None:
            raise MountError("it is not mounted any more")
        return residents, service

    async def _recorded(self, request: dict[str, object]) -> dict[str, object]:
        _, service = self._mounted(request)
        return await service.recorded()

    async def _timing(self, request: dict[str, object]) -> dict[str, object]:
        _, service = self._mounted(request)
        return service.timed()

    async def _ended(self, request: dict[str, object]) -> dict[str, object]:
        """A container has ended: its mount goes at once, what it leaves is cleaned up afterwards."""
        _, service = self._mounted(request)
        text = None
        if "report" in request:
            asked = _object(request, "report")
            mounted_s, total_s = (float(str(asked.get(name))) for name in ("mounted_s", "total_s"))
            result = RunResult(
                exit_code=int(str(asked.get("exit_code"))),
                mounted_s=mounted_s,
                first_output_s=None,
                total_s=total_s,
                mount=service.made or service.info(mounted_s),
                report=service.report(),
            )
            text = json.dumps(result.to_json(), indent=2) + "\n"
        await service.leave()
        return {"type": "ended", "report": text}

    async def _unmount(self, request: dict[str, object]) -> dict[str, object]:
        lazy = request.get("lazy") is True
        if self._residents and await self._residents.restoring.unmount(str(request.get("id")), lazy=lazy):
            return stopped(None, None)
        residents, service = self._mounted(request)
        log.info("unmount asked for id=%s lazy=%s", service.place.record.id, lazy)
        report = service.report()
        users = await service.end(lazy=lazy)
        if users is None:
            # It may be slow, on a busy disk, but nobody else has a part in it.
            with trio.move_on_after(CLEAN_S):
                await residents.cleaned_up(service.place)
        return stopped(report, users)

    async def _let_go(self, _request: dict[str, object]) -> dict[str, object]:
        """Give up what is kept for the next start, for whoever looks after the cache."""
        trees = 0
        if (residents := self._residents) is not None:
            await residents.settle()
            trees = await residents.trees.let_go()
        return {"type": "let_go", "trees": trees}

    # Beginning and end

    async def _follow_signals(self, nursery: trio.Nursery) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                log.info("asked to end signal=%s", signal.Signals(number).name)
                if number == signal.SIGHUP:
                    await self._hand_over()
                if not self._stopping:
                    self._stopping = True
                    nursery.start_soon(self._end_when_empty, nursery.cancel_scope)
                await self._unmount_all()

    async def _end_when_empty(self, scope: trio.CancelScope) -> None:
        """Serve on whoever still uses a mount: after us, nobody would keep holes from being read."""
        if self._residents is not None:
            await self._residents.trees.close()
            await self._residents.until_empty()
        scope.cancel()

    async def _unmount_all(self) -> None:
        for service in list(self._residents.services.values()) if self._residents else ():
            try:
                await service.unmount(lazy=True)
            except (VeneerError, OSError) as error:
                log.error("cannot unmount id=%s cause=%r", service.place.record.id, str(error))
        if self._residents is not None:
            await self._residents.restoring.unmount_all()
        if self._residents is not None and self._residents.count:
            log.info("detached; %d mounts may be in use still", self._residents.count)

    async def _hand_over(self) -> NoReturn:
        """End for another worker to go on: everything stays mounted, and who waits gets bytes or waits on."""
        self._stopping = self._handing_over = True
        if self._residents is not None:
            await self._residents.trees.close()
        if self._guards is not None:
            with trio.move_on_after(DRAIN_S):
                await self._guards.devices.drain()
        log.info("handing over")
        logging.shutdown()
        os._exit(RESTART)

    async def _until_idle(self, seconds: float) -> None:
        while True:
            if self._residents is not None:
                await self._residents.until_empty()
            with trio.move_on_after(seconds):
                if self._residents is None:
                    await trio.sleep_forever()
                await self._residents.changed()
                continue
            return

    async def _tell(self, message: dict[str, object]) -> None:
        try:
            await self._supervisor.send(json.dumps(message).encode())
        except OSError as error:
            log.warning("the supervisor does not hear us cause=%r", error.strerror)

    async def _stay_alive(self) -> None:
        while True:
            await trio.sleep(ALIVE_S)
            await self._tell({"type": "alive"})

    async def _follow_supervisor(self) -> None:
        """Start a supervisor when there is none any more: this process alone would be one kill from harm."""
        arguments = self._arguments
        while True:
            try:
                if await self._supervisor.recv(1):
                    continue
            except OSError as error:
                log.warning("lost the supervisor cause=%r", error.strerror)
            log.error("both supervisors have died; starting another one")
            try:
                fresh = await trio.to_thread.run_sync(
                    start_adopting_supervisor,
                    arguments.run_dir,
                    arguments.group,
                    arguments.listener,
                    arguments.lock,
                    arguments.idle_exit,
                )
            except OSError as error:
                log.critical(
                    "no supervisor: if this process is killed, reads may be wrong cause=%r", str(error)
                )
                await trio.sleep(ADOPT_RETRY_S)
                continue
            self._supervisor.close()
            self._supervisor = trio.socket.from_stdlib_socket(fresh)
            await self._tell({"type": "ready"})


async def _vital(function: Callable[..., Awaitable[None]], **more: object) -> None:
    """End this process at once if a task fails that everything depends on: another worker can go on.

    To end in order would mean to wait for mounts that nobody serves any more.
    """
    try:
        await function(**more)
    except Exception:
        log.exception("bug")
        logging.shutdown()
        os._exit(1)


def _object(request: dict[str, object], name: str) -> dict[str, object]:
    value = request.get(name)
    if not isinstance(value, dict):
        raise UsageError(f"the request has no {name}")
    return value


def main(read_run: ReadRun, read_status: ReadStatus) -> int:
    """Serve until told to stop."""
    arguments = Arguments.parse(sys.argv[1:])
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(level=logging.INFO, format=_FORMAT)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.chdir("/")
    for fd in (arguments.group, arguments.listener, arguments.lock, arguments.supervisor):
        if fd is not None:
            # A child that kept the group or the lock would keep them from ending with the daemon.
            os.set_inheritable(fd, False)
    raise_descriptor_limit()
    sys.setswitchinterval(SWITCH_S)
    worker = Worker(arguments, read_run, read_status)
    try:
        trio.run(worker.run)
    except VeneerError as error:
        log.error("failed error=%s cause=%r", type(error).__name__, error.message)
        message = error_to_json(error)
    except BaseException as error:
        log.exception("bug")
        message = {"type": "error", "message": f"internal error: {error!r}"}
    else:
        return 0
    with socket.socket(fileno=os.dup(arguments.supervisor)) as supervisor:
        supervisor.send(json.dumps(message).encode())
    return 1
