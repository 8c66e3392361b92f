"""What the tests of the supervisor execute: the supervisor with a worker of theirs, that worker, and a reader.

The worker does what it is told through the daemon's socket, one word a connection; see ``Worker.obey``.
"""

import ctypes
import errno
import json
import os
import random
import select
import signal
import socket
import sys
from collections.abc import Callable
from itertools import pairwise
from types import FrameType

BLOCK = 4096
PROGRAM = (sys.executable, "-P", os.path.abspath(__file__))
#: How the worker begins: "" or late (ready when told so), fail (says why not), die.
MODE = "VENEER_TEST_MODE"
#: The sparse file that it fills, in bytes :data:`READERS` processes that read from it.
DEVICE, READERS = "VENEER_TEST_DEVICE", "VENEER_TEST_READERS"
_ALIVE_S = 0.1
_PUNCH = 3


def block(number: int) -> bytes:
    """What the device has there."""
    return (number + 1).to_bytes(8, "little") * (BLOCK // 8)


class Worker:
    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        value = dict(pairwise(arguments))
        self.run_dir, self.idle_exit = value["--run-dir"], value["--idle-exit"]
        self.group = None if value["--group"] == "none" else int(value["--group"])
        self.lock = int(value["--lock"])
        self.listener = socket.socket(fileno=int(value["--socket"]))
        self.supervisor = socket.socket(fileno=int(value["--supervisor"]))
        for fd in (self.lock, self.listener.fileno(), self.supervisor.fileno(), self.group or 0):
            os.set_inheritable(fd, False)
        self.hushed = self.holding = self.stubborn = False
        self.asked: socket.socket | None = None
        self.held: dict[int, int] = {}
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.signalled)

    def signalled(self, number: int, _frame: FrameType | None) -> None:
        self.note(f"worker got {signal.Signals(number).name}")
        if self.stubborn:
            self.stubborn = False
        else:
            os._exit(75 if number == signal.SIGHUP else 0)

    def note(self, text: str) -> None:
        os.write(2, f"{text}\n".encode())

    def tell(self, **message: object) -> None:
        self.supervisor.send(json.dumps(message).encode())

    def run(self) -> None:
        mode = os.environ.get(MODE, "")
        if mode == "fail":
            self.tell(type="error", message="there is no cheese", hint="buy some")
            os._exit(1)
        if mode == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.group is not None and "--fresh-group" in self.arguments:
            self.mark(self.group)
        if mode != "late":
            self.tell(type="ready")
        poller = select.poll()
        for fd in (self.listener.fileno(), self.supervisor.fileno(), *([self.group] if self.group else [])):
            poller.register(fd, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poller.poll(_ALIVE_S * 1000)]
            if not self.hushed:
                try:
                    self.tell(type="alive")
                except OSError:
                    self.note("worker finds no supervisor")
            for fd in ready:
                if fd == self.listener.fileno():
                    self.obey(self.listener.accept()[0])
                elif fd == self.group:
                    self.serve(self.group)
                elif fd == self.supervisor.fileno() and not self.supervisor.recv(1):
                    poller.unregister(fd)
                    self.adopt()
                    poller.register(self.supervisor.fileno(), select.POLLIN)

    def obey(self, client: socket.socket) -> None:
        word, _, rest = client.recv(100).decode().partition(" ")
        actions: dict[str, Callable[[], object]] = {
            "who": lambda: None,
            "exit": lambda: os._exit(int(rest)),
            "hush": lambda: setattr(self, "hushed", True),
            "stubborn": lambda: setattr(self, "stubborn", True),
            "ready": lambda: self.tell(type="ready"),
            "nonsense": lambda: self.supervisor.send(b"\xff{"),
            "hold": lambda: setattr(self, "holding", True),
            "release": self.release,
        }
        actions[word]()
        if word == "hold":
            self.asked = client
        else:
            self.reply(client)

    def reply(self, client: socket.socket) -> None:
        with open("/proc/self/oom_score_adj", encoding="ascii") as file:
            answer = {"pid": os.getpid(), "arguments": self.arguments, "oom_score_adj": int(file.read())}
        client.sendall(json.dumps(answer).encode())
        client.close()

    def adopt(self) -> None:
        from veneer.daemon.handover import start_adopting_supervisor

        self.supervisor.close()
        self.supervisor = start_adopting_supervisor(
            self.run_dir,
            self.group,
            self.listener.fileno(),
            self.lock,
            self.idle_exit,
            program=(*PROGRAM, "supervisor"),
        )

    # The device

    def mark(self, group: int) -> None:
        from veneer.mount import fanotify

        if DEVICE in os.environ:
            fd = os.open(os.environ[DEVICE], os.O_RDWR | os.O_CLOEXEC)
            fanotify.mark(group, fd)
            os.close(fd)

    def serve(self, group: int) -> None:
        from veneer.mount import fanotify

        for event in fanotify.read_events(group):
            for number in range(event.offset // BLOCK, (event.offset + event.length) // BLOCK):
                os.pwrite(event.fd, block(number), number * BLOCK)
            if self.holding:
                self.held[event.pid] = event.fd
            else:
                fanotify.answer(group, event.fd)
                os.close(event.fd)
        if self.asked is not None and len(self.held) == int(os.environ[READERS]):
            # Every reader waits for us, so nothing is being read: make holes again.
            size = os.fstat(fd := next(iter(self.held.values()))).st_size
            if ctypes.CDLL(None).fallocate(fd, _PUNCH, ctypes.c_long(0), ctypes.c_long(size)) != 0:
                raise OSError("cannot punch")
            self.reply(self.asked)
            self.asked = None

    def release(self) -> None:
        """Have what is held fail: it was punched out."""
        from veneer.mount import fanotify

        self.holding = False
        for fd in self.held.values():
            fanotify.answer(self.group or 0, fd, errno.EIO)
            os.close(fd)
        self.held.clear()


def read(path: str, seed: int) -> None:
    """Read single blocks until standard input ends, and say what came of it."""
    fd = os.open(path, os.O_RDONLY)
    blocks = os.fstat(fd).st_size // BLOCK
    choose = random.Random(seed)
    found = {"right": 0, "failed": 0, "wrong": 0}
    while not select.select([0], [], [], 0)[0]:
        number = choose.randrange(blocks)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            data = os.pread(fd, BLOCK, number * BLOCK)
        except OSError as error:
            found["failed" if error.errno == errno.EIO else "wrong"] += 1
        else:
            found["right" if data == block(number) else "wrong"] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    if role == "supervisor":
        from veneer.daemon.supervisor import main

        sys.exit(main(rest, (*PROGRAM, "supervisor"), (*PROGRAM, "worker")))
    if role == "worker":
        Worker(rest).run()
    read(rest[0], int(rest[1]))
