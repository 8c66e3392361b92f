"""The process that verifies, decodes and writes spans for a store: ``python -m veneer.store.decoder_main``.

Takes batches from a socket and answers each; both ends are one program. The stored bytes are in memory that
both have, the data file comes with the batch. Ends with the socket, and so with whoever started it. Knows
neither trio nor HTTP. :mod:`veneer.store.decoder` is the other end.

Invariant: nothing is written but plain bytes of spans whose stored bytes had their digest, each at its place.
So whatever is written late, or in vain, can be none but the right bytes; whether they are there, and stay,
only the other end decides, which marks them.
"""

import hashlib
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple, Self

from veneer.codec import check_and_decode
from veneer.errors import VeneerError
from veneer.index.model import Codec, Span

__all__ = ["MESSAGE", "READY", "WRONG", "Answer", "Batch", "main"]

#: Bytes of a message; a socket takes as many at once.
MESSAGE = 128 << 10
#: The first message, before all answers.
READY = b"ready"
#: In place of the digest of plain bytes.
WRONG = bytes(32)
_RAW = Codec("raw")
#: Ticket, seconds.
_ANSWER = struct.Struct("=Qd")


class Batch(NamedTuple):
    """Spans to verify, decode and write.

    Args:
        ticket: names the batch in its answer.
        place: where the stored bytes are in the memory that both ends have.
        base: offset in the blob of what is there.
        spans: in ascending order; their device offsets are those in the data file.
    """

    ticket: int
    place: int
    base: int
    spans: Sequence[Span]


class Answer(NamedTuple):
    """What became of a batch.

    Args:
        ticket: of the batch.
        cpu_s: processor time that it took.
        digests: SHA-256 of the plain bytes of each span, which are written; :data:`WRONG` for one that is not
            what it should be. None at all: nothing counts as written.
    """

    ticket: int
    cpu_s: float
    digests: Sequence[bytes]

    def pack(self) -> bytes:
        """As a message."""
        return _ANSWER.pack(self.ticket, self.cpu_s) + b"".join(self.digests)

    @classmethod
    def parse(cls, message: bytes) -> Self:
        """Of a message. Raises ValueError."""
        count, rest = divmod(len(message) - _ANSWER.size, len(WRONG))
        if count < 0 or rest:
            raise ValueError(f"an answer of {len(message)} bytes")
        ticket, cpu_s = _ANSWER.unpack_from(message)
        places = range(_ANSWER.size, len(message), len(WRONG))
        return cls(ticket, cpu_s, [message[place : place + len(WRONG)] for place in places])


def main() -> None:
    """Carry out batches until the other end is closed. Arguments: the socket, the memory, threads."""
    # Whoever started the daemon in a terminal means the daemon by Ctrl-C; it tells us by closing its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whoever waits for an answer that does not come is to know at once.
    threading.excepthook = _die
    fd, memory, count = map(int, sys.argv[1:])
    sock = socket.socket(fileno=fd)
    view = memoryview(mmap.mmap(memory, os.fstat(memory).st_size, prot=mmap.PROT_READ))
    sock.send(READY)
    threads = [threading.Thread(target=_serve, args=(sock, view)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _die(bug: threading.ExceptHookArgs) -> None:
    threading.__excepthook__(bug)
    os._exit(1)


def _serve(sock: socket.socket, view: memoryview) -> None:
    while True:
        message, fds, _, _ = socket.recv_fds(sock, MESSAGE, 1)
        if not message:
            return
        (data,) = fds
        try:
            answer = _carry_out(pickle.loads(message), view, data)
        finally:
            os.close(data)
        try:
            sock.send(answer.pack())
        except BrokenPipeError:
            return


def _carry_out(batch: Batch, view: memoryview, data: int) -> Answer:
    began = time.thread_time()
    digests: list[bytes] = []
    run: list[bytes] = []
    end = 0
    try:
        for span in batch.spans:
            at = batch.place + span.stored_offset - batch.base
            try:
                plain = check_and_decode(span, view[at : at + span.stored_length], "")
            except VeneerError:
                # The other end looks what is wrong, and says so.
                digests.append(WRONG)
                continue
            digests.append(span.digest if span.codec == _RAW else hashlib.sha256(plain).digest())
            if span.offset != end:
                _write(data, run, end)
                run = []
            run.append(plain)
            end = span.offset + span.length
        _write(data, run, end)
    except OSError:
        # The other end meets the same error, and knows what to do about it.
        digests = []
    return Answer(batch.ticket, time.thread_time() - began, digests)


def _write(data: int, run: Sequence[bytes], end: int) -> None:
    """Write what lies side by side, and ends at ``end``."""
    left = sum(map(len, run))
    written = os.pwritev(data, run, end - left)
    if written != left:
        rest = memoryview(b"".join(run))
        while written < left:
            written += os.pwrite(data, rest[written:], end - left + written)


if __name__ == "__main__":
    main()
