"""Sending one blob: in one piece when small, in chunks that can go on after a fault when large.

The bytes are hashed on the way: a body that is not what its descriptor says is found here and never stored.
A session that the registry has forgotten is begun again; one that it still has goes on where it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import urlencode

import trio

from veneer.errors import IntegrityError, NotFound, RegistryError, Unauthorized, VeneerError
from veneer.events import Progress, Reporter
from veneer.oci.descriptor import Descriptor
from veneer.registry.answers import REDIRECTS
from veneer.registry.session import PUSH, Call, Session
from veneer.source.base import BlobBody
from veneer.transport import Attempts, Patience, Response
from veneer.transport.address import redirect_target

__all__ = ["Upload", "has_blob"]

#: Up to this size one request is cheaper than the chance of sending it twice.
MONOLITHIC_LIMIT = 4 << 20
#: Memory that an upload takes, and what a fault costs at most. Object stores behind registries take parts of
#: at least 5 MiB, which registries would otherwise have to collect.
CHUNK_SIZE = 8 << 20
#: The largest OCI-Chunk-Min-Length that is honoured: it is memory here.
_MAX_CHUNK_SIZE = 64 << 20
#: From the last progress on.
_PATIENCE = Patience(tries=8, deadline_s=120.0)
#: Sessions begun anew for one blob: a registry that keeps losing them will not keep this blob either.
_MAX_RESTARTS = 3
_PATCHED = frozenset({201, 202, 204})
_RANGE = re.compile(r"(?:bytes=)?0-(\d{1,18})")
_OCTETS = {"Content-Type": "application/octet-stream"}
#: Codes by which registries say that a session, or what they got in it, is of no use any more.
_BROKEN = frozenset({"BLOB_UPLOAD_UNKNOWN", "BLOB_UPLOAD_INVALID", "DIGEST_INVALID", "SIZE_INVALID"})


async def has_blob(session: Session, descriptor: Descriptor, actions: str) -> bool:
    """Whether the repository has the blob with the right size.

    A redirect says that it is there; the store that it leads to may not answer HEAD at all.
    """
    what = f"{session.name}@{descriptor.digest}"
    call = Call("HEAD", f"blobs/{descriptor.digest}", what, REDIRECTS | {200}, actions)

    async def ask() -> bool:
        async with await session.send(call) as response:
            return response.status != 200 or response.length in (None, descriptor.size)

    try:
        return await session.run(ask, what)
    except NotFound:
        return False


class _Body:
    """The bytes to send, hashed from their beginning to ``position``. Belongs to one task."""

    def __init__(self, descriptor: Descriptor, opener: BlobBody, what: str) -> None:
        self._descriptor = descriptor
        self._opener = opener
        self._what = what
        self._file: BinaryIO | None = None
        self._hasher = descriptor.digest.hasher()
        self.position = 0

    async def read(self, length: int) -> bytes:
        """The next ``length`` bytes, fewer at the end. The last ones only if all of them are as promised."""
        return await trio.to_thread.run_sync(self._read, length)

    async def seek(self, position: int) -> None:
        """Go to ``position``, by reading again from the beginning: bodies need not be seekable."""
        if position != self.position:
            await trio.to_thread.run_sync(self._seek, position)

    def close(self) -> None:
        """Close the body."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _seek(self, position: int) -> None:
        self.close()
        self._hasher = self._descriptor.digest.hasher()
        self.position = 0
        while self.position < position:
            self._read(min(CHUNK_SIZE, position - self.position))

    def _read(self, length: int) -> bytes:
        size = self._descriptor.size
        last = self.position + length >= size
        # One byte more at the end shows a body that is too long.
        wanted = size - self.position + 1 if last else length
        if self._file is None:
            self._file = self._opener()
        parts: list[bytes] = []
        while wanted > 0 and (part := self._file.read(wanted)):
            parts.append(part)
            wanted -= len(part)
        data = b"".join(parts)
        self._hasher.update(data)
        self.position += len(data)
        if (self.position != size) if last else wanted > 0:
            raise IntegrityError(
                f"{self._what}: the bytes to push are {'more' if self.position > size else 'fewer'} "
                f"than the {size} of the descriptor"
            )
        if last:
            self._descriptor.digest.check_hash(self._hasher, f"{self._what}: the bytes to push")
        return data


@dataclass(slots=True)
class _State:
    """An upload session at the registry. ``location`` is "" before there is one.

    Args:
        location: where the next request of the session goes.
        certain: whether the registry is known to hold exactly the bytes sent so far.
        chunk_size: bytes to send at once.
        restarts: sessions that were lost.
        reported: bytes that the last progress event named.
    """

    location: str = ""
    certain: bool = False
    chunk_size: int = CHUNK_SIZE
    restarts: int = 0
    reported: int = -1


class Upload:
    """The upload of one blob to one repository. Belongs to one task."""

    def __init__(self, session: Session, descriptor: Descriptor) -> None:
        self._session = session
        self._descriptor = descriptor
        self._what = f"{session.name}@{descriptor.digest}"

    async def mount(self, origin: str) -> bool:
        """Take the blob from repository ``origin`` of the same registry; whether that worked."""
        query = urlencode({"mount": str(self._descriptor.digest), "from": origin})
        try:
            response = await self._session.run(
                lambda: self._send(
                    "POST",
                    f"blobs/uploads/?{query}",
                    frozenset({201, 202}),
                    body=b"",
                    extra_scope=f"repository:{origin}:pull",
                ),
                self._what,
            )
        except (NotFound, Unauthorized):
            return False  # of the origin: whether we may write shows when we do
        if response.status == 202:  # the registry would rather have the bytes, and has opened a session
            await self._abandon(redirect_target(response.url, response.header("Location"), self._what))
        return response.status == 201

    async def push(self, opener: BlobBody, report: Reporter) -> None:
        """Send the blob. Raises IntegrityError when the body is not what the descriptor says."""
        size = self._descriptor.size
        patience = _PATIENCE.for_transfer(min(size, _MAX_CHUNK_SIZE))
        attempts = self._session.transport.attempts(patience)
        body, state = _Body(self._descriptor, opener, self._what), _State()
        try:
            while True:
                try:
                    with attempts.bounded(self._what):
                        if await self._step(body, state):
                            break
                except RegistryError as error:
                    await self._recover(error, state, attempts)
                    continue
                if body.position > max(state.reported, 0) and body.position < size:
                    attempts.progress(body.position - max(state.reported, 0))
                    state.reported = body.position
                    report(Progress("push", self._descriptor.digest.hex[:12], body.position, size))
        except VeneerError:
            if state.location:
                await self._abandon(state.location)
            raise
        finally:
            body.close()
        report(Progress("push", self._descriptor.digest.hex[:12], size, size))

    async def _step(self, body: _Body, state: _State) -> bool:
        """One request of the upload; whether it was the last one."""
        size = self._descriptor.size
        if not state.location:
            if state.restarts and await has_blob(self._session, self._descriptor, PUSH):
                return True  # only the answer to the last request was lost
            await self._begin(state)
            await body.seek(0)
        elif not state.certain:
            await body.seek(await self._ask(state))
        elif size <= MONOLITHIC_LIMIT or body.position == size:
            rest = await body.read(size) if body.position < size or size == 0 else b""
            state.certain = False
            separator = "&" if "?" in state.location else "?"
            target = f"{state.location}{separator}{urlencode({'digest': str(self._descriptor.digest)})}"
            await self._send("PUT", target, frozenset({201, 204}), _OCTETS, rest)
            return True
        else:
            await self._patch(body, state)
        return False

    async def _begin(self, state: _State) -> None:
        response = await self._send("POST", "blobs/uploads/", frozenset({202}), body=b"")
        minimum = response.header("OCI-Chunk-Min-Length")
        if minimum.isascii() and minimum.isdecimal() and len(minimum) < 12:
            state.chunk_size = max(CHUNK_SIZE, min(int(minimum), _MAX_CHUNK_SIZE))
        self._move(state, response)
        state.certain = True

    async def _ask(self, state: _State) -> int:
        """How many bytes the registry has of this session."""
        response = await self._send("GET", state.location, frozenset({200, 202, 204}))
        place = _place(response)
        if place is None or place > self._descriptor.size:
            # No range, or "0-0", which means one byte or none.
            raise RegistryError(f"{self._what}: the registry does not know how far it is", status=416)
        self._move(state, response)
        state.certain = True
        return place

    async def _patch(self, body: _Body, state: _State) -> None:
        start = body.position
        data = await body.read(state.chunk_size)
        state.certain = False
        headers = {**_OCTETS, "Content-Range": f"{start}-{body.position - 1}"}
        response = await self._send("PATCH", state.location, _PATCHED, headers, data)
        self._move(state, response)
        state.certain = _place(response) in (None, body.position)

    async def _recover(self, error: RegistryError, state: _State, attempts: Attempts) -> None:
        lost = error.status in (404, 416) or not _BROKEN.isdisjoint(error.codes)
        if state.location and lost and state.restarts < _MAX_RESTARTS:
            state.restarts += 1
            state.location = ""
            self._session.transport.stats.retries += 1
            return
        await attempts.recover(error)
        if self._descriptor.size <= MONOLITHIC_LIMIT and state.location:
            # Asking how far a small upload came costs as much as sending it again.
            state.restarts += 1
            state.location = ""

    async def _send(
        self,
        method: str,
        target: str,
        expect: frozenset[int],
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        extra_scope: str = "",
    ) -> Response:
        call = Call(method, target, self._what, expect, PUSH, headers or {}, body, extra_scope)
        async with await self._session.send(call) as response:
            await response.discard()
            return response

    def _move(self, state: _State, response: Response) -> None:
        """Go on at the Location of an answer, relative or absolute; without one, where it was."""
        if (location := response.header("Location")) or not state.location:
            state.location = redirect_target(response.url, location, self._what)

    async def _abandon(self, location: str) -> None:
        """Tell the registry that a session is over. It would find out by itself in a week."""
        call = Call("DELETE", location, self._what, frozenset({200, 202, 204}), PUSH)
        try:
            async with await self._session.send(call) as response:
                await response.discard()
        except RegistryError:
            return


def _place(response: Response) -> int | None:
    """The number of bytes that a Range header says are there, None when it does not say."""
    match = _RANGE.fullmatch(response.header("Range").strip())
    return int(match[1]) + 1 if match and match[1] != "0" else None
