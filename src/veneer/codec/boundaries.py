"""Finds places where a gzip stream can be entered, while somebody inflates it for its bytes.

Inflaters for Python do not tell where blocks begin. But a block of the usual kind begins with the codes that it
uses, some hundred bytes of which nothing comes out, while a symbol never takes more than six bytes. So where it
is about time for a checkpoint the stream is given in small steps; a step without any output is inside of such a
header. The boundary is a few bytes before it, and which bit it is at is tried out: from there, with the
window that is known, the same bytes have to come out as came out anyway.

Invariant: every checkpoint was entered once, and gave what the stream gives there. Streams without such blocks
get fewer checkpoints or none, at a bounded cost; stored and fixed blocks are not looked for.

Not for: indexes that others use, which prove all of each stretch (:mod:`veneer.convert.stretches`).
"""

from collections import deque
from collections.abc import Callable
from typing import Final, cast

from isal import isal_zlib

from veneer.codec.deflate import Checkpoint, Inflater, inflater_at
from veneer.index.model import WINDOW_SIZE, pack_carry

__all__ = ["BoundaryFinder"]

#: Stored bytes of a step: a header is found if all of a step lies in it. Those of programs have 80 to 110, of
#: simpler things 40; and each step costs some 3 us, as the inflater moves its window.
_STEP: Final = 24
#: Steps in a row, so that what comes out at once is bounded.
_STEPS: Final = 64
#: The last symbol before a boundary began at most so many bytes before its step.
_SYMBOL: Final = 8
#: Plain bytes that have to be the same, in which references to the window are as good as certain; and stored
#: bytes that are given at a time to have them.
_ALIKE, _PROBE = 4 << 10, 256
#: What a block of the usual kind, which is not the last, begins with: three bits.
_DYNAMIC: Final = 0b100
#: Stored bytes that are searched for one checkpoint: blocks have some 25 KB. After that it is tried again
#: later, and later each time.
_MOST_SEARCHED: Final = 256 << 10
#: Its stubs call the class an instance.
_IsalError = cast("type[Exception]", isal_zlib.error)


class BoundaryFinder:
    """Inflates one stream in place of its inflater, and notes checkpoints. For one thread.

    Args:
        spacing: plain bytes between checkpoints at least.
        note: gets them, in ascending order.
        offset: of the first plain byte that comes.
    """

    def __init__(self, spacing: int, note: Callable[[Checkpoint], None], offset: int = 0) -> None:
        self._tell = note
        self._spacing = spacing
        self._position = offset
        self._due = offset + spacing
        #: The latest plain bytes, at least a window of them once there are so many.
        self._recent: deque[bytes] = deque()
        self._held = 0
        self._searched = self._failures = 0

    def member(self, place: int) -> None:
        """Note that a member begins at a stored offset: it can be entered there in any case."""
        if self._position >= self._due:
            self._note(Checkpoint(place, self._position, 0, b""))

    def inflate(self, member: Inflater, stored: bytes, place: int, most: int) -> tuple[bytes, bytes]:
        """Some plain bytes, and the stored ones that are left; what follows the member if that has ended.

        Args:
            member: an inflater of raw deflate.
            stored: what comes next; maybe empty, if output may be left.
            place: where that is in the stream.
            most: plain bytes; a search may give a few more.

        Raises:
            isal_zlib.error: the stream is malformed.
        """
        if self._position < self._due or len(stored) < _STEP:
            plain = member.decompress(stored, most)
            self._passed(plain)
            return plain, member.unused_data if member.eof else member.unconsumed_tail
        return self._search(member, stored, place, most)

    def _search(self, member: Inflater, stored: bytes, place: int, most: int) -> tuple[bytes, bytes]:
        pieces: list[bytes] = []
        size = at = 0
        while len(stored) - at >= _STEP and size < most and not member.eof and self._position >= self._due:
            run, stalled = _run(member, stored, at)
            at += _STEP * (len(run) + stalled)
            # Without any output before it, a header may have begun in what came earlier.
            if run:
                self._passed(b"".join(run))
                if stalled:
                    plain, at = self._try(member, stored, place, at)
                    self._passed(plain)
                    run.append(plain)
            pieces += run
            size += sum(map(len, run))
        self._searched += at * (self._position >= self._due)
        if self._searched > _MOST_SEARCHED:
            self._failures += 1
            self._due = self._position + (self._spacing << min(self._failures, 10))
            self._searched = 0
        rest = stored[at:]
        return b"".join(pieces), member.unused_data + rest if member.eof else rest

    def _try(self, member: Inflater, stored: bytes, place: int, at: int) -> tuple[bytes, int]:
        """Find the boundary before the step without output that ends at ``at``: what comes next, its end."""
        header, probe = at - _STEP, []
        size = 0
        while at < len(stored) and size < _ALIKE and not member.eof:
            given = stored[at : at + _PROBE]
            probe.append(member.decompress(given))
            size += len(probe[-1])
            at += len(given)
        plain = b"".join(probe)
        if size >= _ALIKE and not member.eof:
            window = self._window()
            for bit in range(8 * max(0, header - _STEP - _SYMBOL), 8 * (header + 1)):
                byte, shift = divmod(bit, 8)
                if int.from_bytes(stored[byte : byte + 2], "little") >> shift & 7 != _DYNAMIC:
                    continue
                first = byte + bool(shift)
                carry = pack_carry(8 - shift, stored[byte] >> shift) if shift else 0
                if _gives(plain, carry, window, stored[first:at]):
                    self._note(Checkpoint(place + first, self._position, carry, window))
                    break
        return plain, at

    def _note(self, checkpoint: Checkpoint) -> None:
        self._tell(checkpoint)
        self._due = checkpoint.offset + self._spacing
        self._searched = self._failures = 0

    def _passed(self, plain: bytes) -> None:
        self._position += len(plain)
        if not plain:
            return
        self._recent.append(plain)
        self._held += len(plain)
        while self._held - len(self._recent[0]) >= WINDOW_SIZE:
            self._held -= len(self._recent.popleft())

    def _window(self) -> bytes:
        parts = [piece[-WINDOW_SIZE:] for piece in self._recent]
        # What a stream refers to has come out of it: zeros before its beginning are never seen.
        return b"".join((bytes(WINDOW_SIZE), *parts))[-WINDOW_SIZE:]


def _run(member: Inflater, stored: bytes, at: int) -> tuple[list[bytes], bool]:
    """What each step gives from ``at`` on, up to one that gives nothing, which is told of."""
    run: list[bytes] = []
    last = min(len(stored) - _STEP, at + _STEP * (_STEPS - 1))
    while at <= last and not member.eof:
        if not (plain := member.decompress(stored[at : at + _STEP])):
            return run, True
        run.append(plain)
        at += _STEP
    return run, False


def _gives(plain: bytes, carry: int, window: bytes, stored: bytes) -> bool:
    try:
        return inflater_at(carry, window).decompress(stored, len(plain) + 1) == plain
    except _IsalError:
        return False
