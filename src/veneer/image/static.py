"""Static profiles of images: what :mod:`veneer.prefetch.static` tells, reading through a store."""

from collections.abc import Sequence

import trio

from veneer.index.model import ImageIndex
from veneer.oci.config import ImageConfig
from veneer.oci.digest import Digest
from veneer.prefetch.profile import DEFAULT_WORKLOAD, Profile
from veneer.prefetch.static.start import Command, static_profile
from veneer.store.fetch import Priority
from veneer.store.spanstore import AttachedDevice, SpanStore

__all__ = ["command_of", "look"]

#: Headers of a file are looked at one after the other: this much is fetched at once.
_WINDOW = 256 << 10


def command_of(config: ImageConfig, words: Sequence[str] = ()) -> Command:
    """What is started: the words in place of the image's Cmd, as ``veneer run`` does it."""
    return Command.create((*config.entrypoint, *(words or config.cmd)), config.env, config.working_dir)


async def look(
    index: ImageIndex,
    store: SpanStore,
    attached: Sequence[AttachedDevice],
    command: Command,
    *,
    workload: str = DEFAULT_WORKLOAD,
    image: Digest | None = None,
) -> Profile:
    """The static profile of a command; without a use if nothing can be told.

    Args:
        index: the image.
        store: where its bytes are read.
        attached: its devices, in order.
        command: what is started.
        workload: what to call it.
        image: digest of its manifest.

    Raises VeneerError as reading does.
    """

    async def fetch(node: int, offset: int, length: int) -> bytes:
        out = bytearray(length)
        for extent in index.extents(node, offset, length):
            window = (extent.offset, extent.offset + max(extent.length, _WINDOW))
            data = await store.read(
                attached[extent.device],
                extent.offset,
                extent.length,
                window=window,
                priority=Priority.COMPLETION,
            )
            at = extent.file_offset - offset
            out[at : at + extent.length] = data
        return bytes(out)

    def read(node: int, offset: int, length: int) -> bytes:
        return trio.from_thread.run(fetch, node, offset, length)

    def work() -> Profile:
        return static_profile(
            index, read, command, workload=workload, image="" if image is None else str(image)
        )

    return await trio.to_thread.run_sync(work)
