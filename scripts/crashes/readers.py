"""Processes that read a mounted tree and compare every byte with a plain directory.

An error is a legal answer and noted with its errno; a wrong byte is not, and stops everything. What has been
read is dropped from the page cache at once, so that the next read of it goes to the device again.
"""

import ctypes
import errno
import json
import mmap
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.context import ForkProcess
from pathlib import Path

from crashes.content import Content

__all__ = ["Failure", "Pool", "ReadError", "WrongBytes"]

#: A read that takes longer than this hangs: the deadline of the store is a few seconds.
STUCK_S = 45.0
_POLL_S = 0.01
#: Descriptors that a reader keeps open, so that it also reads what has been unmounted or remounted since.
_HELD = 8
_WHOLE = 64 << 10
_RANGE = 256 << 10
#: After an error, so that a mount that only fails does not use up the machine.
_AFTER_ERROR_S = 0.01
_READS, _BYTES, _ERRORS, _BUSY_SINCE = range(4)
_FIELDS = 4
_WRONG_STATUS = 3


class Failure(Exception):
    """The matrix has found a bug. The message has all details."""


class WrongBytes(Failure):
    """A reader got other bytes than it should."""


@dataclass(frozen=True, slots=True)
class ReadError:
    """An error that a reader got: when (monotonic, and as logs say it), where, and in which kind of reading."""

    at: float
    time: str
    path: str
    offset: int
    errno: int
    doing: str

    @property
    def name(self) -> str:
        """The errno by name."""
        return errno.errorcode.get(self.errno, str(self.errno))


class Pool:
    """Reader processes over one mount point; forked, so the caller must have no threads.

    Args:
        content: what is read and what it is compared with.
        point: the mount point.
        directory: where the readers leave notes.
        count: how many processes.
    """

    def __init__(self, content: Content, point: Path, directory: Path, count: int) -> None:
        self._content = content
        self._point = point
        self._directory = directory
        self._count = count
        self._context = multiprocessing.get_context("fork")
        self._shared = self._context.RawArray(ctypes.c_uint64, _FIELDS * count)
        self._stop = self._context.RawValue(ctypes.c_bool, False)
        self._processes: list[ForkProcess] = []
        directory.mkdir(parents=True, exist_ok=True)

    def start(self, seed: str) -> None:
        """Read at random until :meth:`stop`."""
        self._run([_RandomReader(seed, number) for number in range(self._count)])

    def sweep(self, seed: str) -> None:
        """Read every file once, from the first byte to the last, and come back."""
        order = list(range(len(self._content.files)))
        random.Random(seed).shuffle(order)
        self._run([_Sweeper(order[number :: self._count]) for number in range(self._count)])
        while any(process.is_alive() for process in self._processes):
            self.check()
            time.sleep(_POLL_S)
        self.stop()

    def stop(self) -> None:
        """Let every reader finish the read that it is in. Raises Failure when one does not."""
        self._stop.value = True
        for process in self._processes:
            while process.is_alive():
                self.check()
                process.join(_POLL_S)
        self.check()
        self._processes = []
        self._stop.value = False

    def kill(self) -> None:
        """Whatever state they are in."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []

    @property
    def reads(self) -> int:
        """Reads that gave right bytes."""
        return sum(self._column(_READS))

    @property
    def bytes(self) -> int:
        """Right bytes read."""
        return sum(self._column(_BYTES))

    @property
    def error_count(self) -> int:
        """Reads that gave an error."""
        return sum(self._column(_ERRORS))

    def errors(self) -> list[ReadError]:
        """All errors so far, in the order of time."""
        found = []
        for path in self._directory.glob("errors-*"):
            # The last line may be being written.
            lines = path.read_text().splitlines(keepends=True)
            found += [ReadError(**json.loads(line)) for line in lines if line.endswith("\n")]
        return sorted(found, key=lambda error: error.at)

    def wait_for_reads(self, each: int, deadline_s: float) -> None:
        """Wait until every reader has made so many more reads without an error. Raises Failure."""
        before, until = self._column(_READS), time.monotonic() + deadline_s
        while any(now < then + each for now, then in zip(self._column(_READS), before, strict=True)):
            self.check()
            if time.monotonic() > until:
                last = Counter(error.name for error in self.errors()[-50:])
                raise Failure(f"no right bytes for {deadline_s:g} s; last errors: {dict(last)}")
            time.sleep(_POLL_S)

    def wait_for_errors(self, count: int, deadline_s: float) -> bool:
        """Wait until there are so many more errors; False when they do not come."""
        goal, until = self.error_count + count, time.monotonic() + deadline_s
        while self.error_count < goal:
            self.check()
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_S)
        return True

    def check(self) -> None:
        """Raises Failure when a reader got wrong bytes, hangs, or died."""
        for process in self._processes:
            if process.exitcode == _WRONG_STATUS:
                notes = "\n".join(path.read_text() for path in sorted(self._directory.glob("wrong-*")))
                raise WrongBytes(notes)
            if process.exitcode:
                raise Failure(f"a reader ended with status {process.exitcode}")
        now = time.monotonic()
        for number, process in enumerate(self._processes):
            since = self._shared[_FIELDS * number + _BUSY_SINCE] / 1e9
            if since and process.is_alive() and now - since > STUCK_S:
                raise Failure(f"a read hangs for {now - since:.0f} s: {_where(process.pid)}")

    def _column(self, field: int) -> list[int]:
        return list(self._shared[field::_FIELDS])

    def _run(self, readers: "Sequence[_Reader]") -> None:
        for number, reader in enumerate(readers):
            reader.point, reader.content = self._point, self._content
            reader.notes, reader.number = self._directory, number
            reader.shared, reader.stop = self._shared, self._stop
            process = self._context.Process(target=reader.main, daemon=True)
            process.start()
            self._processes.append(process)


def _where(pid: int | None) -> str:
    """Where in the kernel a process waits."""
    try:
        return Path(f"/proc/{pid}/stack").read_text()
    except OSError as error:
        return error.strerror or ""


class _Reader:
    """What both kinds of readers do, in a process of their own."""

    doing = ""
    number: int
    point: Path
    content: Content
    notes: Path
    shared: "ctypes.Array[ctypes.c_uint64]"
    stop: ctypes.c_bool

    def main(self) -> None:
        """Read until the end."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with open(self.notes / f"errors-{self.doing}-{self.number}", "a", buffering=1) as self.errors:
            self.read()

    def read(self) -> None:
        """The reads of this kind of reader."""
        raise NotImplementedError

    def open(self, path: str) -> int | None:
        """Open a file of the mounted tree; None after an error."""
        self._busy()
        try:
            return os.open(self.point / path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._failed(path, 0, error)
            return None
        finally:
            self._idle()

    def compare(self, fd: int, path: str, offset: int, length: int) -> bool:
        """Read a range and compare it; False after an error. Wrong bytes end the process."""
        self._busy()
        try:
            got = _pread(fd, offset, length)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self._failed(path, offset, error)
            return False
        finally:
            self._idle()
        with open(self.content.plain / path, "rb") as plain:
            want = os.pread(plain.fileno(), length, offset)
        if got != want:
            self._wrong(path, offset, got, want)
        self.shared[_FIELDS * self.number + _READS] += 1
        self.shared[_FIELDS * self.number + _BYTES] += length
        return True

    def _busy(self) -> None:
        self.shared[_FIELDS * self.number + _BUSY_SINCE] = time.monotonic_ns()

    def _idle(self) -> None:
        self.shared[_FIELDS * self.number + _BUSY_SINCE] = 0

    def _failed(self, path: str, offset: int, error: OSError) -> None:
        note = ReadError(
            time.monotonic(), f"{datetime.now(UTC):%T.%f}", path, offset, error.errno or 0, self.doing
        )
        self.errors.write(json.dumps(asdict(note)) + "\n")
        self.shared[_FIELDS * self.number + _ERRORS] += 1
        time.sleep(_AFTER_ERROR_S)

    def _wrong(self, path: str, offset: int, got: bytes, want: bytes) -> None:
        at = [i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b]
        zeros = sum(1 for i in at if got[i] == 0)
        first, last = (at[0], at[-1]) if at else (len(got), len(got))
        note = (
            f"wrong bytes ({self.doing}) in {path}: range {offset}+{len(want)}, {len(got)} bytes read; "
            f"{len(at)} differ, {zeros} of them zeros, from {offset + first} to {offset + last}\n"
            f"  got    {got[first : first + 32].hex()}\n  wanted {want[first : first + 32].hex()}\n"
        )
        (self.notes / f"wrong-{self.number}").write_text(note)
        os._exit(_WRONG_STATUS)


class _RandomReader(_Reader):
    """Random ranges of random files, with some descriptors held for long."""

    doing = "reading"

    def __init__(self, seed: str, number: int) -> None:
        self._rng = random.Random(f"{seed} {number}")

    def read(self) -> None:
        """Read until told to stop."""
        rng, held = self._rng, list[tuple[int, str, int]]()
        while not self.stop.value:
            if len(held) < _HELD or rng.random() < 0.6:
                path, size = rng.choice(self.content.files)
                fd = self.open(path)
                if fd is None:
                    continue
                held.append((fd, path, size))
            if len(held) > _HELD:
                os.close(held.pop(rng.randrange(_HELD))[0])
            which = rng.randrange(len(held))
            fd, path, size = held[which]
            offset, length = self._range(size)
            if not self.compare(fd, path, offset, length):
                # It may belong to a mount that has ended: such a descriptor fails for good.
                os.close(held.pop(which)[0])

    def _range(self, size: int) -> tuple[int, int]:
        if size <= _WHOLE:
            return 0, size
        length = self._rng.randrange(1, _RANGE)
        offset = self._rng.randrange(size)
        return offset, min(length, size - offset)


class _Sweeper(_Reader):
    """Whole files, each once; every third of them mapped, after its first bytes were read without an error."""

    doing = "sweep"

    def __init__(self, order: Sequence[int]) -> None:
        self._order = order

    def read(self) -> None:
        """Read the files given."""
        for turn, which in enumerate(self._order):
            path, size = self.content.files[which]
            fd = self.open(path)
            if fd is None:
                continue
            try:
                if self.compare(fd, path, 0, size) and turn % 3 == 0:
                    self._compare_mapped(fd, path, size)
            finally:
                os.close(fd)

    def _compare_mapped(self, fd: int, path: str, size: int) -> None:
        self._busy()
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
            got = mapped[:]
        self._idle()
        want = (self.content.plain / path).read_bytes()
        if got != want:
            self._wrong(path, 0, got, want)


def _pread(fd: int, offset: int, length: int) -> bytes:
    """Every byte of a range, or less at the end of the file only: a short read may have an error behind it."""
    pieces = []
    while length:
        piece = os.pread(fd, length, offset)
        if not piece:
            break
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return b"".join(pieces)
