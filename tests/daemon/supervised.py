"""A daemon whose processes tests kill: what it logs is what they wait for."""

import json
import os
import re
import select
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from tests.daemon.supervised_program import PROGRAM
from tests.processes import stop_at_once

__all__ = ["ADOPTS", "READY", "STANDBY", "TAKES_OVER", "WORKER", "Daemon", "Manager", "running"]


#: What the log says.
TAKES_OVER = r"pid=(\d+) primary died, the standby takes its place"
STANDBY, WORKER = r"standby started pid=(\d+)", r"worker started pid=(\d+)"
ADOPTS, READY = r"pid=(\d+) both supervisors died", "worker ready"


class Answer(NamedTuple):
    """What a worker says of itself."""

    pid: int
    arguments: list[str]
    oom_score_adj: int


class Daemon:
    """One daemon, started in the foreground, with its log."""

    def __init__(self, run_dir: Path, process: subprocess.Popen[str]) -> None:
        if process.stderr is None or process.stdout is None:
            raise AssertionError("two pipes were asked for")
        self.run_dir = run_dir
        self.process = process
        self.log: IO[str] = process.stderr
        self.said: IO[str] = process.stdout
        #: All lines that :meth:`expect` has seen.
        self.lines: list[str] = []

    def expect(self, *texts: str) -> list[re.Match[str]]:
        """Read the log until each pattern was found once, in any order."""
        missing = dict(enumerate(texts))
        found: dict[int, re.Match[str]] = {}
        while missing:
            line = self.log.readline()
            if not line:
                raise AssertionError(f"the daemon ended; its log: {''.join(self.lines)}")
            self.lines.append(line)
            for key, text in missing.items():
                if match := re.search(text, line):
                    found[key] = match
                    del missing[key]
                    break
        return [found[key] for key in range(len(texts))]

    def until_gone(self) -> None:
        """Until no process of the daemon has the log open."""
        self.lines += self.log.readlines()

    def ask(self, word: str) -> Answer:
        """Have the worker do something; waits for the next one if there is none now."""
        return Answer(**json.loads(self.order(word)))

    def order(self, word: str) -> bytes:
        """Have the worker do something that may be its end."""
        with self.connection() as client:
            client.sendall(word.encode())
            return b"".join(iter(lambda: client.recv(4096), b""))

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """A client of the daemon's socket, however long its path is."""
        directory = os.open(self.run_dir, os.O_PATH)
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"/proc/self/fd/{directory}/daemon.sock")
                yield client
        finally:
            os.close(directory)

    @property
    def pids(self) -> dict[str, int]:
        """Of supervisor, standby and worker."""
        return dict(json.loads((self.run_dir / "daemon.json").read_bytes()))

    def kill(self, *roles: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to processes of the daemon, before any of them can do anything about the others."""
        pids = [self.pids[role] for role in roles]
        if len(pids) > 1:
            stop_at_once(pids)
        for pid in pids:
            os.kill(pid, number)

    def clean_up(self) -> None:
        """Kill all there is; they replace each other until the last one is gone."""
        while not select.select([self.log], [], [], 0)[0] or self.log.readline():
            with suppress(OSError, ValueError):
                for role in ("supervisor", "standby", "worker"):
                    pid = self.pids[role]
                    if os.fsencode(self.run_dir) in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()
        self.said.close()


class Manager:
    """What systemd does for a service, as far as we use it."""

    def __init__(self, run_dir: Path, *, abstract: bool) -> None:
        run_dir.mkdir(mode=0o700, parents=True)
        self.control = socket.socket(socket.AF_UNIX)
        self.control.bind(os.fspath(run_dir / "daemon.sock"))
        self.control.listen()
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notices.bind("" if abstract else os.fspath(run_dir / "notify"))
        address = self.notices.getsockname()
        self.address = "@" + address[1:].decode() if abstract else address
        self.group: int | None = None

    def environment(self, *names: str) -> dict[str, str]:
        return {
            "NOTIFY_SOCKET": self.address,
            "WATCHDOG_USEC": "1000000",
            "LISTEN_FDNAMES": ":".join(names),
        }

    def expect(self, *lines: str) -> None:
        """Read until each line has come."""
        missing = set(lines)
        while missing:
            data, fds, _, _ = socket.recv_fds(self.notices, 4096, 1)
            missing -= set(data.decode().split("\n"))
            if fds:
                assert b"FDSTORE=1\nFDNAME=group" in data
                self.group = fds[0]

    def close(self) -> None:
        self.control.close()
        self.notices.close()
        if self.group is not None:
            os.close(self.group)


@contextmanager
def running(
    run_dir: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    fds: Sequence[int] = (),
    ready: bool = True,
) -> Iterator[Daemon]:
    """A daemon; with ``fds``, as a service manager starts it."""
    command = [*PROGRAM, "supervisor", os.fspath(run_dir), *options]
    if fds:
        # Only the process itself knows its number.
        moves = " ".join(f"{to}<&{fd}" for to, fd in enumerate(fds, 3))
        command = ["bash", "-c", f'LISTEN_PID=$$ exec "$@" {moves}', "start", *command]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {}), "LISTEN_FDS": str(len(fds))},
        pass_fds=fds,
    )
    daemon = Daemon(run_dir, process)
    try:
        if ready:
            daemon.expect("worker ready")
        yield daemon
    finally:
        daemon.clean_up()
