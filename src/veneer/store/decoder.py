"""Spans verified, decoded and written by a process of its own, while this one answers and receives.

Hashing, decompressing and writing 2 MiB is some sixty calls that give up the interpreter's lock and want it
back. Threads that do it wait for each of them behind the event loop, as soon as that has readers to answer.
:mod:`veneer.store.decoder_main` is the process that does it instead. It is started when all of a device is
being fetched, and ends when there was nothing to do for a while.

It is a help that nothing depends on: what it does not do, or not in time, whoever asked does himself. It marks
nothing as present, and may be killed at any time.
"""

import contextlib
import itertools
import logging
import mmap
import os
import pickle
import socket
import subprocess
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from veneer.index.model import Span
from veneer.store.decoder_main import MESSAGE, READY, Answer, Batch

__all__ = ["Decoder"]

log = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-P", "-m", "veneer.store.decoder_main")
#: The C library is to keep what it has, where it would give it back after each span, and have it cleared again.
_ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
#: Bytes of one batch, stored, and how many spans: the message about them is far from the longest one.
_SLOT, _MOST_SPANS = 4 << 20, 256
#: More threads would wait for each other.
_MOST_THREADS = 4
#: A disk that takes so long for one batch is no help to anybody; then it is done here.
_PATIENCE_S = 5.0
#: For the start of an interpreter on a busy machine; nobody waits for it.
_START_S = 30.0
#: Without anything to do for so long, the process ends.
_IDLE_S = 60.0
#: Time that a process has to die.
_REAP_S = 1.0
#: Processes that die are not replaced for ever.
_MOST_DEATHS = 3


@dataclass(slots=True, eq=False)
class _Work:
    """A batch that was handed over; without an answer, it was not done."""

    done: trio.Event = field(default_factory=trio.Event)
    answer: Answer | None = None


@dataclass(slots=True, eq=False)
class _Running:
    """One process, its end of the socket, and the memory that it sees."""

    process: "subprocess.Popen[bytes]"
    socket: trio.socket.SocketType
    memory: mmap.mmap
    slots: list[int]
    works: dict[int, _Work] = field(default_factory=dict)
    ended: bool = False


class Decoder:
    """Such a process, or none. Belongs to one event loop.

    Args:
        nursery: owns the task that takes answers.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._threads = min(_MOST_THREADS, os.cpu_count() or 1)
        self._running: _Running | None = None
        self._started = False
        self._deaths = 0
        self._tickets = itertools.count()
        self._freed = trio.lowlevel.ParkingLot()

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        return None if self._running is None else self._running.process.pid

    @property
    def running(self) -> bool:
        """Whether there is a process to give work to."""
        return self._running is not None

    def want(self) -> None:
        """Start the process, if there is none; it is used as soon as it is there."""
        if not self._started and self._deaths < _MOST_DEATHS:
            # Until it has ended.
            self._started = True
            self._nursery.start_soon(self._run)

    async def fill(self, data_fd: int, spans: Sequence[Span], base: int, data: bytes) -> Answer | None:
        """Have spans verified, decoded and written; None if that was not done, or not in time.

        A cancellation waits for the end. The answer has a digest for each span, or none.

        Args:
            data_fd: the data file, in plain form; may be closed when this returns.
            spans: in ascending order.
            base: offset in the blob of ``data``.
            data: has the stored bytes of all spans.
        """
        begin, end = spans[0].stored_offset, spans[-1].stored_offset + spans[-1].stored_length
        if end - begin > _SLOT or len(spans) > _MOST_SPANS:
            return None
        while (running := self._running) is not None and not running.slots:
            await self._freed.park()
        if running is None:
            return None
        place = running.slots.pop()
        running.memory[place : place + end - begin] = memoryview(data)[begin - base : end - base]
        batch = Batch(next(self._tickets), place, begin, spans)
        work = running.works[batch.ticket] = _Work()
        with trio.move_on_after(_PATIENCE_S, shield=True) as scope:
            try:
                await running.socket.sendmsg([pickle.dumps(batch)], [_passed(data_fd)])
                await work.done.wait()
            except (OSError, trio.ClosedResourceError) as error:
                self._lose(running, str(error))
        if scope.cancelled_caught:
            self._lose(running, f"no answer for {_PATIENCE_S:g} s")
        if (answer := work.answer) is None:
            return None
        running.slots.append(place)
        self._freed.unpark()
        if len(answer.digests) not in (0, len(spans)):
            self._lose(running, f"{len(answer.digests)} digests for {len(spans)} spans")
            return None
        return answer

    async def _run(self) -> None:
        try:
            running = await trio.to_thread.run_sync(self._start)
        except OSError as error:
            self._started = False
            self._deaths += 1
            log.warning("no process that decodes can be started cause=%r", str(error))
            return
        try:
            with trio.fail_after(_START_S):
                if await running.socket.recv(MESSAGE) != READY:
                    raise EOFError("it did not start")
            self._running = running
            while await self._answer(running):
                pass
        except (OSError, EOFError, ValueError, KeyError, trio.ClosedResourceError, trio.TooSlowError) as error:
            self._lose(running, str(error))
        finally:
            self._started = False
            self._end(running)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_reap, running.process)

    async def _answer(self, running: _Running) -> bool:
        """Pass on an answer; False if none is to be expected."""
        with trio.move_on_after(_IDLE_S):
            message = await running.socket.recv(MESSAGE)
            if not message:
                raise EOFError("it has ended")
            answer = Answer.parse(message)
            work = running.works.pop(answer.ticket)
            work.answer = answer
            work.done.set()
            return True
        return bool(running.works)

    def _start(self) -> _Running:
        """Blocks."""
        size = _SLOT * (self._threads + 1)
        mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            fd = os.memfd_create("veneer-decoder")
            try:
                os.ftruncate(fd, size)
                memory = mmap.mmap(fd, size)
                shared = (other.fileno(), fd)
                arguments = (*_COMMAND, *map(str, shared), str(self._threads))
                process = subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, pass_fds=shared, env=os.environ | _ALLOCATION
                )
            except BaseException:
                mine.close()
                raise
            finally:
                os.close(fd)
        slots = list(range(0, size, _SLOT))
        return _Running(process, trio.socket.from_stdlib_socket(mine), memory, slots)

    def _lose(self, running: _Running, why: str) -> None:
        """Do without a process that failed."""
        if not running.ended:
            self._deaths += 1
            log.warning("the process that decodes is given up cause=%r", why)
            self._end(running)

    def _end(self, running: _Running) -> None:
        if not running.ended:
            running.ended, self._running = True, None
            running.process.kill()
            running.socket.close()
            for work in running.works.values():
                work.done.set()
            running.works.clear()
            self._freed.unpark_all()


def _passed(fd: int) -> tuple[int, int, bytes]:
    """The control message that brings a descriptor."""
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]).tobytes()


def _reap(process: "subprocess.Popen[bytes]") -> None:
    # One that hangs in the kernel is left for later: subprocess looks again when it starts another.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_REAP_S)
