"""Metadata images written by a process of their own, while this one fetches and verifies.

Decoding and merging a tree and writing an EROFS image of it takes the interpreter for some 60 ms in an image of
10,000 files. In the daemon's worker, that would be taken from the event loop and from the threads that verify
what the mount is about to read. :mod:`veneer.mount.scribe_main` is that process; it is started ahead.

It is a help and nothing that mounts depend on: when it dies, the image is written here, and the next one by
another such process.
"""

import contextlib
import logging
import pickle
import subprocess
import sys
from dataclasses import dataclass, field

import trio

from veneer.errors import VeneerError
from veneer.mount.metadata import MetadataImage, may_be_kept
from veneer.mount.scribe_main import LENGTH, Commission

__all__ = ["Scribe"]

log = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-P", "-m", "veneer.mount.scribe_main")
_CHUNK = 64 << 10


@dataclass(slots=True, eq=False)
class _Work:
    """A commission under way, and what became of it; nothing if whoever had it carried out went away."""

    done: trio.Event = field(default_factory=trio.Event)
    outcome: MetadataImage | VeneerError | None = None


class Scribe:
    """One such process, which carries out one commission at a time. Belongs to one event loop."""

    def __init__(self) -> None:
        self._process: trio.Process | None = None
        self._turn = trio.Lock()
        self._works: dict[object, _Work] = {}

    @property
    def pid(self) -> int | None:
        """The process, if it has been started."""
        return self._process and self._process.pid

    async def start(self) -> None:
        """Start the process ahead, so that its imports are over when it is needed."""
        async with self._turn:
            await self._start()

    async def write(self, commission: Commission) -> MetadataImage:
        """Have an image written, once if it is asked for while it is. Raises VeneerError as the work does."""
        while (work := self._works.get(commission.key)) is not None:
            await work.done.wait()
            if work.outcome is not None:
                return _image(work.outcome)
        work = self._works[commission.key] = _Work()
        try:
            outcome = work.outcome = await self._written(commission)
        finally:
            del self._works[commission.key]
            work.done.set()
        return _image(outcome)

    async def write_ahead(self, commission: Commission) -> None:
        """Have an image written that somebody will ask for, unless it may be there; he is told what fails."""
        cache_dir, packs = commission.cache_dir, commission.packs
        if await trio.to_thread.run_sync(may_be_kept, commission.identity, cache_dir, packs):
            return
        with contextlib.suppress(VeneerError):
            await self.write(commission)

    async def aclose(self) -> None:
        """End the process."""
        if (process := self._process) is None:
            return
        self._process = None
        process.kill()
        with trio.CancelScope(shield=True):
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()
            await process.wait()

    async def _written(self, commission: Commission) -> MetadataImage | VeneerError:
        async with self._turn:
            try:
                return await self._have_written(commission)
            except (OSError, trio.BrokenResourceError, EOFError) as error:
                log.warning("the process that writes metadata images has died cause=%r", str(error))
            try:
                return await trio.to_thread.run_sync(commission.carry_out)
            except VeneerError as error:
                return error

    async def _start(self) -> trio.Process:
        process = self._process
        if process is not None and process.poll() is not None:
            await self.aclose()
            process = None
        if process is None:
            process = self._process = await trio.lowlevel.open_process(
                _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        return process

    async def _have_written(self, commission: Commission) -> MetadataImage | VeneerError:
        process = await self._start()
        if process.stdin is None or process.stdout is None:
            raise AssertionError("two pipes were asked for")
        data = pickle.dumps(commission)
        finished = False
        try:
            await process.stdin.send_all(LENGTH.pack(len(data)) + data)
            answer = bytearray()
            while len(answer) < LENGTH.size or len(answer) < LENGTH.size + LENGTH.unpack_from(answer)[0]:
                chunk = await process.stdout.receive_some(_CHUNK)
                if not chunk:
                    raise EOFError("it closed its output")
                answer += chunk
            finished = True
        finally:
            if not finished:
                # Its answer would be taken for that to the next commission.
                await self.aclose()
        outcome: MetadataImage | VeneerError = pickle.loads(memoryview(answer)[LENGTH.size :])
        return outcome


def _image(outcome: MetadataImage | VeneerError) -> MetadataImage:
    if isinstance(outcome, VeneerError):
        raise outcome
    return outcome
