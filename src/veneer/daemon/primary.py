"""The processes that keep a daemon's fanotify group open and its worker running: primary and standby.

When the last descriptor of a group is closed, the kernel lets every reader of an incomplete device go on, to
holes that read as zeros. So the group belongs to three processes: a worker, which answers the events; the
primary, which starts another worker when that one dies; and the standby, a fork of the primary that waits for
its death and then goes on in its place. A worker that has lost both starts a supervisor that adopts it
(:mod:`veneer.daemon.handover`). Whichever one or two of the three are killed, readers wait or get EIO.

Invariants:

- Before a worker runs, the standby has everything that belongs to it (see ``start_gated``).
- Events that a dead worker has read and not answered are answered with EIO before another worker runs.

Every module imported here is small, and of the standard library or like this one: the less is done in this
process, the less can kill it. It has one thread, which never waits for a network or for a file of an image.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from veneer.daemon import instance, myself, systemd
from veneer.daemon.children import MAX_MESSAGE, BackOff, News, Standby, Worker, news_until_death
from veneer.daemon.held import STATE_VARIABLE, SUPERVISOR, Held
from veneer.daemon.myself import EXIT_ERROR, error_message, log
from veneer.daemon.process import Process, in_words, start_gated
from veneer.mount import fanotify

__all__ = ["GROUP", "WORKER", "Supervisor"]

#: The program of the worker: the daemon, and whoever reads command lines for it.
WORKER = (sys.executable, "-P", "-m", "veneer.cli.worker")
#: Exit code of a worker that wants another one in its place, as SIGHUP asks it to.
RESTART_ME = 75
#: The silence of a worker is counted in ticks of this process: time in which neither ran does not count.
TICKS = 12
#: What the group is called where the service manager keeps it.
GROUP = "group"


class Supervisor:
    """Runs a daemon, as its primary. Forks, so it belongs to a process with one thread."""

    def __init__(
        self,
        run_dir: str,
        held: Held,
        program: Sequence[str] = SUPERVISOR,
        worker_program: Sequence[str] = WORKER,
    ) -> None:
        self._run_dir = run_dir
        self._held = held._replace(worker=None, standby=None)
        self._program, self._worker_program = program, worker_program
        self._worker: Worker | None = None
        self._standby: Standby | None = None
        #: Of the image of this process before this one; stays until it is replaced.
        self._old_standby = Standby(Process(*held.standby), None) if held.standby else None
        self._worker_back_off, self._standby_back_off = BackOff(), BackOff()
        #: Whether any worker has ever been ready: from then on there may be mounts to protect.
        self._established = held.group_used
        self._stopping = self._reloading = False
        #: Ticks since any worker said something.
        self._silent = 0
        self._error: Mapping[str, object] | None = None
        self._exit: int | None = None
        self._told = held.told
        if held.worker is not None:
            pid, fd, link = held.worker
            self._worker = Worker(Process(pid, fd), socket.socket(fileno=link), ready=True)
        self._tick_s = min(held.watchdog_s / TICKS, (held.manager_watchdog_s or held.watchdog_s) / 3)
        self._next_tick, self._wake = 0.0, -1

    def run(self) -> int:
        """Until there is nothing left to do; returns the exit code."""
        self._begin_as_primary()
        while self._exit is None:
            self._start_what_is_due()
            self._wait()
            if time.monotonic() >= self._next_tick:
                self._tick()
        for standby in filter(None, (self._standby, self._old_standby)):
            standby.end()
        with contextlib.suppress(OSError):
            instance.withdraw(self._run_dir, own_socket=self._held.own_socket)
        if self._held.group is not None:
            self._notify("FDSTOREREMOVE=1", f"FDNAME={GROUP}")
        log("INFO", f"ended code={self._exit}")
        return self._exit

    def _begin_as_primary(self) -> None:
        myself.set_name("veneer-primary")
        self._next_tick = time.monotonic() + self._tick_s
        self._wake = myself.wake_up_by_signals()
        if self._held.succession is None:
            self._held = self._held._replace(succession=myself.one_byte())
        # With a worker it is in the place of another primary, which may not have come so far.
        self._notify(f"MAINPID={os.getpid()}", *([] if self._worker is None else ["READY=1"]))

    def _start_what_is_due(self) -> None:
        if self._standby is None and time.monotonic() >= self._standby_back_off.at:
            try:
                self._start_standby()
            except OSError as error:
                log("ERROR", f"cannot start a standby cause={error.strerror!r}")
                self._standby_back_off.died(time.monotonic())
        if self._standby is not None and self._old_standby is not None:
            self._old_standby.end()
            self._old_standby = None
        if self._worker is None and time.monotonic() >= self._worker_back_off.at:
            try:
                self._start_worker()
            except OSError as error:
                log("ERROR", f"cannot start a worker cause={error.strerror!r}")
                self._worker_back_off.died(time.monotonic())

    def _start_worker(self) -> None:
        held, group = self._held, self._held.group
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = [held.listener, held.lock, theirs.fileno(), *([] if group is None else [group])]
        argv = [*self._worker_program, *held.worker_arguments(self._run_dir, theirs.fileno())]
        used = held._replace(group_used=True)
        try:
            with theirs:
                environment = {**os.environ, STATE_VARIABLE: used._replace(succession=None).to_json()}
                process, gate = start_gated(argv, environment, given, self._before_worker)
        except OSError:
            ours.close()
            raise
        self._held = used
        self._worker = Worker(process, ours)
        self._tell_standby([process.fd, ours.fileno()])
        os.write(gate, b"!")
        os.close(gate)
        self._publish()
        log("INFO", f"worker started pid={process.pid}")

    def _before_worker(self) -> None:
        """In the process that becomes one: what it does with memory is its own risk."""
        if self._held.oom_score_adj is not None:
            myself.set_oom_score_adj(self._held.oom_score_adj)

    def _start_standby(self) -> None:
        """Fork a standby. Returns in the primary, and in the standby when it has become that.

        Raises OSError.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            primary = Process.of_this()
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            else:
                if pid:
                    self._standby = Standby(Process.of_child(pid), ours)
                    self._publish()
                    log("INFO", f"standby started pid={pid}")
                else:
                    ours.close()
                    self._stand_by(theirs, primary.fd)
                    log("WARNING", f"primary died, the standby takes its place worker={self._worker_pid}")
            finally:
                primary.close()

    def _tell_standby(self, fds: Sequence[int] = ()) -> None:
        """Tell what has changed; with the descriptors of a worker that does not run yet."""
        if self._standby is None:
            return
        try:
            self._standby.tell(News(self._worker_pid, self._held.restarts, self._stopping), fds)
        except OSError as error:
            # It is dead, or has been stopped for long. Another one is forked, with all that this process knows.
            log("WARNING", f"standby does not listen pid={self._standby.process.pid} cause={error.strerror!r}")
            self._standby.end()
            self._standby = None

    # The standby

    def _stand_by(self, link: socket.socket, primary: int) -> None:
        """Wait for the death of the primary, then be the primary. What fails here ends this process only."""
        became_primary = False
        try:
            self._wait_for_succession(link, primary)
            self._begin_as_primary()
            became_primary = True
        finally:
            if not became_primary:
                os._exit(EXIT_ERROR)

    def _wait_for_succession(self, link: socket.socket, primary: int) -> None:
        myself.ignore_signals(self._wake)
        os.setsid()
        myself.let_go_of(0, 1)
        self._told = True
        myself.set_name("veneer-standby")
        if self._old_standby is not None:
            self._old_standby.forget()
            self._old_standby = None
        for news, fds in news_until_death(primary, link):
            self._learn(news, fds)
        succession = self._held.succession
        if succession is None or not os.read(succession, 1):
            os._exit(0)  # the primary died with two of them, and the other one was faster
        os.close(succession)
        # A worker that was not ready would die of SIGTERM, and the next one end in order.
        self._established = True
        if self._worker is not None:
            self._worker.ready = True
            self._worker.silent = 0
        self._silent = 0
        self._standby_back_off = BackOff()
        self._held = self._held._replace(succession=None)

    def _learn(self, news: News, fds: Sequence[int]) -> None:
        """Take in what :meth:`_tell_standby` sent."""
        self._stopping = news.stopping
        self._held = self._held._replace(restarts=news.restarts, group_used=True)
        if fds and news.worker is not None:
            if self._worker is not None:
                self._worker.forget()
            self._worker = Worker(Process(news.worker, fds[0]), socket.socket(fileno=fds[1]))

    def _wait(self) -> None:
        """Wait until something happens, and handle one thing."""
        handlers: dict[int, Callable[[], None]] = {self._wake: self._signalled}
        until = [self._next_tick]
        if self._worker is None:
            until.append(self._worker_back_off.at)
        else:
            handlers[self._worker.process.fd] = self._worker_died
            if not self._worker.mute:
                handlers[self._worker.link.fileno()] = self._listen
        if self._standby is None:
            until.append(self._standby_back_off.at)
        else:
            handlers[self._standby.process.fd] = self._standby_died
        poller = select.poll()
        for fd in handlers:
            poller.register(fd, select.POLLIN)
        timeout_s = max(0.0, min(until) - time.monotonic())
        ready = {fd for fd, _ in poller.poll(timeout_s * 1000)}
        for fd, handler in handlers.items():
            if fd in ready:
                handler()
                return

    def _signalled(self) -> None:
        for number in os.read(self._wake, MAX_MESSAGE):
            if number != signal.SIGHUP:
                self._stop()
            elif not self._stopping:
                log("INFO", "reloading")
                self._reloading = True
                self._notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
                if self._worker is None:
                    self._execute_anew()
                elif self._worker.ready:
                    self._worker.process.send(signal.SIGHUP)

    def _stop(self) -> None:
        again, self._stopping = self._stopping, True
        if not again:
            log("INFO", "stopping")
            self._notify("STOPPING=1")
            self._tell_standby()
        # Before it is ready it might die of it, and would have to be started again.
        if self._worker is not None and (self._worker.ready or again):
            self._worker.process.send(signal.SIGTERM)

    def _listen(self) -> None:
        worker = self._worker
        message = None if worker is None else worker.hear()
        if worker is None or message is None:
            return
        worker.silent = self._silent = 0
        kind = message.get("type")
        if kind == "error":
            self._error = message
            log("ERROR", f"worker failed pid={worker.process.pid} cause={message.get('message')!r}")
        elif kind not in ("alive", "ready"):
            log("ERROR", f"worker says nonsense pid={worker.process.pid}")
        elif kind == "ready" and not worker.ready:
            worker.ready = self._established = True
            log("INFO", f"worker ready pid={worker.process.pid}")
            self._tell({"type": "ready"})
            self._notify("READY=1", f"STATUS=worker {worker.process.pid}, {self._held.restarts} restarts")
            if self._stopping:
                worker.process.send(signal.SIGTERM)
            elif self._reloading:
                worker.process.send(signal.SIGHUP)

    def _tick(self) -> None:
        self._next_tick = time.monotonic() + self._tick_s
        most = self._held.watchdog_s / self._tick_s
        self._silent += 1
        if self._silent <= most and self._held.manager_watchdog_s is not None:
            self._notify("WATCHDOG=1")
        worker = self._worker
        if worker is not None:
            worker.silent += 1
            if worker.silent > most:
                log("ERROR", f"worker hangs, killing it pid={worker.process.pid}")
                worker.silent = 0
                worker.process.send(signal.SIGKILL)

    def _standby_died(self) -> None:
        standby, self._standby = self._standby, None
        if standby is not None:
            delay = self._standby_back_off.died(standby.since)
            self._publish()
            log("WARNING", f"standby died pid={standby.process.pid} again_in={delay:g}")
            standby.bury()

    def _worker_died(self) -> None:
        worker = self._worker
        if worker is None:
            return
        while not worker.mute:
            self._listen()  # its last words
        status = worker.process.reap()
        worker.forget()
        self._worker = None
        group = self._held.group
        orphans = 0 if group is None else fanotify.sweep(group, myself.descriptor_limit())
        text = f"worker ended pid={worker.process.pid} status={in_words(status)!r} events_failed={orphans}"
        if not self._established:
            # Nothing is mounted yet, and whoever started the daemon waits for a word.
            log("ERROR", text)
            cause = f"the daemon's worker ended before it was ready: {in_words(status)}"
            self._tell({**error_message(cause), **(self._error or {})})
            self._exit = EXIT_ERROR
        elif status == 0 and (self._stopping or not select.select([self._held.listener], [], [], 0)[0]):
            # With a client in the queue, which came too late for a worker that had nothing to do, it goes on.
            log("INFO", text)
            self._exit = 0
        elif self._reloading or status in (0, RESTART_ME):
            log("INFO", text)
            self._worker_back_off.at = 0.0
            if self._reloading:
                self._execute_anew()
        else:
            self._held = self._held._replace(restarts=self._held.restarts + 1)
            delay = self._worker_back_off.died(worker.since)
            self._publish()
            log("ERROR", f"{text} again_in={delay:g}")
        self._error = None

    def _execute_anew(self) -> None:
        """Become the program as it is installed now. The standby stays until the new one has its own."""
        self._reloading = False
        myself.hold_signals()
        if select.select([self._wake], [], [], 0)[0]:
            self._signalled()
        standby = None if self._standby is None else (self._standby.process.pid, self._standby.process.fd)
        held = self._held._replace(standby=standby, told=self._told)
        if not self._stopping:
            try:
                held.execute([*self._program, self._run_dir])
            except OSError as error:
                log("ERROR", f"cannot execute {self._program[0]} cause={error.strerror!r}")
        myself.release_signals()

    def _tell(self, message: Mapping[str, object]) -> None:
        """Say how the start went, once, to whoever started the daemon."""
        if not self._told:
            self._told = True
            myself.say(message)
            if self._held.background:
                myself.let_go_of(1)

    def _notify(self, *lines: str) -> None:
        try:
            systemd.notify(self._held.address, *lines)
        except OSError as error:
            log("WARNING", f"cannot tell the service manager lines={lines!r} cause={error.strerror!r}")

    @property
    def _worker_pid(self) -> int | None:
        return None if self._worker is None else self._worker.process.pid

    def _publish(self) -> None:
        """Say who is who; before the log does, for those who follow that."""
        status = {
            "supervisor": os.getpid(),
            "standby": self._standby and self._standby.process.pid,
            "worker": self._worker_pid,
            "started": self._held.started,
            "restarts": self._held.restarts,
        }
        try:
            instance.publish(self._run_dir, status)
        except OSError as error:
            log("WARNING", f"cannot write to {self._run_dir} cause={error.strerror!r}")
