"""The process that writes EROFS metadata images for the daemon: ``python -m veneer.mount.scribe_main``.

Reads commissions from standard input and writes what became of them to standard output, each a pickle with its
length before it; both ends are one program. Ends with its input, and so with the daemon's worker. Knows neither
trio nor HTTP, so that it is small and starts quickly. :mod:`veneer.mount.scribe` is the other end.
"""

import gc
import os
import pickle
import signal
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from veneer.errors import VeneerError
from veneer.index.merge import merge
from veneer.index.model import ImageIndex
from veneer.index.wire import PackedIndex
from veneer.mount.metadata import MetadataImage, metadata_image
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.prefetch.pack import PackIndex, decode_pack_index

__all__ = ["LENGTH", "Commission", "Pack", "main"]

LENGTH: Final = struct.Struct("<Q")
#: How much nicer others are: it works for a tenth of a second, and has most of a processor then.
_PRECEDENCE: Final = 10


@dataclass(frozen=True)
class Pack:
    """A pack that files are mapped to: its index, stored, which is quicker to hand over than decoded.

    Args:
        descriptor: of the index.
        data: the index; it has been decoded without an error before.
    """

    descriptor: Descriptor
    data: bytes

    @property
    def identity(self) -> Digest:
        """Digest of its index."""
        return self.descriptor.digest

    @cached_property
    def index(self) -> PackIndex:
        """What it has."""
        return decode_pack_index(self.data, self.descriptor)


class Commission(NamedTuple):
    """One image to write.

    Args:
        artifact: the whole index of the image, as :class:`~veneer.index.wire.PackedIndex` takes it.
        identity: its digest.
        devices: number of its layers.
        cache_dir: where the image is kept.
        packs: as for :func:`~veneer.mount.metadata.metadata_image`.
    """

    artifact: bytes
    identity: Digest
    devices: int
    cache_dir: Path
    packs: Sequence[Pack]

    @property
    def key(self) -> tuple[object, ...]:
        """What two commissions for the same image have in common."""
        return self.identity, self.devices, self.cache_dir, tuple(pack.identity for pack in self.packs)

    def carry_out(self) -> MetadataImage:
        """Write the image, unless there is a good one. Raises VeneerError."""
        return metadata_image(self._index, self.identity, self.devices, self.cache_dir, self.packs)

    def _index(self) -> ImageIndex:
        packed = PackedIndex.parse(self.artifact)
        return merge(packed.layers(), packed.policy)


def main() -> None:
    """Carry out commissions until there are no more."""
    # Whoever started the daemon in a terminal means the daemon by Ctrl-C; it tells us by closing our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A tree has no cycles, and looking for some while it grows takes a third of the time.
    gc.disable()
    # What is there for good is not looked at after every image: 3 ms, while the container starts.
    gc.freeze()
    # A start waits for it, and for no thread that verifies beside it. In a container that may be forbidden.
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) - _PRECEDENCE)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (data := _message(source)) is not None:
        commission: Commission = pickle.loads(data)
        outcome: MetadataImage | VeneerError
        try:
            outcome = commission.carry_out()
        except VeneerError as error:
            outcome = error
        answer = pickle.dumps(outcome)
        sink.write(LENGTH.pack(len(answer)) + answer)
        sink.flush()
        del commission, outcome
        gc.collect()


def _message(source: BinaryIO) -> bytes | None:
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    data = source.read(length)
    return data if len(data) == length else None


if __name__ == "__main__":
    main()
