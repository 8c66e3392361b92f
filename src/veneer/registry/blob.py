"""Ranges and streams of one blob of a registry, whatever the servers between do to them.

Bytes leave here unverified but never misplaced: the status, Content-Range and length of every answer are
checked against the request and the descriptor. A transfer that breaks off goes on from the byte it reached. The
object store that a registry redirects to is remembered and asked directly, until it refuses once.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from urllib.parse import urljoin

from veneer.errors import IntegrityError, RegistryError, Unavailable, VeneerError
from veneer.oci.descriptor import Descriptor
from veneer.registry.session import Call, Session
from veneer.transport import Attempts, Response
from veneer.transport.address import origin_of, redact_text

__all__ = ["RegistryBlob"]

#: A server that ignores ranges sends the blob from its start. This much is thrown away to reach a range; past
#: it, every read would cost seconds and the error is more use than the bytes.
SKIP_LIMIT = 8 << 20
#: How a store answers when a presigned address is too old, or its object has gone elsewhere.
_EXPIRED = frozenset({400, 401, 403, 404, 410})
_ANSWERS = frozenset({200, 206, 416})


class RegistryBlob:
    """A :class:`~veneer.source.base.BlobSource`. May be used by many tasks; remembers one redirect for all."""

    def __init__(self, session: Session, descriptor: Descriptor) -> None:
        self._session = session
        self._digest = descriptor.digest
        self._size = descriptor.size
        self._direct: str | None = None

    @property
    def name(self) -> str:
        """``host/repository@digest``."""
        return f"{self._session.name}@{self._digest}"

    @property
    def size(self) -> int:
        """Size in bytes, as the descriptor states it."""
        return self._size

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` unverified bytes from ``offset``; see :class:`~veneer.source.base.BlobSource`.

        Takes at most the read deadline and the time that ``length`` bytes need at the slowest accepted rate.
        """
        if offset < 0 or length < 0 or offset + length > self._size:
            raise self._outside(f"{offset}+{length}")
        if length == 0:
            return b""
        attempts = self._session.transport.attempts(self._session.blob_patience.for_transfer(length))
        with attempts.bounded(self.name):
            async with aclosing(self._transfer(offset, offset + length, SKIP_LIMIT, attempts)) as chunks:
                return b"".join([chunk async for chunk in chunks])
        raise AssertionError("unreachable: bounded() returns only after its body")

    @asynccontextmanager
    async def stream(self, offset: int = 0, length: int | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """The unverified bytes of a range as they arrive; see :class:`~veneer.source.base.BlobSource`."""
        end = self._size if length is None else offset + length
        if not 0 <= offset <= end <= self._size:
            raise self._outside(f"{offset}+{'' if length is None else length}")
        attempts = self._session.transport.attempts(self._session.blob_patience)
        # To the end is most of the blob: a server without ranges may send it from its start again.
        skip_limit = self._size if length is None else SKIP_LIMIT
        async with aclosing(self._transfer(offset, end, skip_limit, attempts)) as chunks:
            yield chunks

    async def _transfer(
        self, place: int, end: int, skip_limit: int, attempts: Attempts
    ) -> AsyncGenerator[bytes, None]:
        """The bytes from ``place`` to ``end``, going on after faults from the byte reached."""
        mistaken = False
        while place < end:
            try:
                with attempts.bounded(self.name):
                    response, skip = await self._open(place, end, skip_limit)
                async with response:
                    async for chunk in response:
                        if skip >= len(chunk):
                            skip -= len(chunk)
                            continue
                        wanted = chunk[skip : skip + end - place]
                        if len(wanted) + skip < len(chunk) and (response.status == 206 or end == self._size):
                            raise self._mistake(response, "more bytes than it announced")
                        skip = 0
                        if wanted:
                            place += len(wanted)
                            attempts.progress(len(wanted))
                            yield wanted
                        if place == end and response.status == 200 and end < self._size:
                            break  # the rest of the blob was not asked for; reading on would be a download
                    if place < end:
                        raise Unavailable(f"{self.name}: GET {self._host(response)}: truncated at {place}")
            except IntegrityError:
                if mistaken:
                    raise
                mistaken = True  # one bad server of many: once more, from the registry
                self._direct = None
                self._session.transport.stats.retries += 1
            except RegistryError as error:
                self._direct = None
                await attempts.recover(error)

    async def _open(self, place: int, end: int, skip_limit: int) -> tuple[Response, int]:
        """An answer with the bytes from ``place`` to ``end``, and the number of bytes in it before them."""
        # Caches between have trouble with ranges, not with whole blobs.
        whole = place == 0 and end == self._size
        response = await self._send({} if whole else {"Range": f"bytes={place}-{end - 1}"})
        try:
            return response, self._check(response, place, end, skip_limit)
        except VeneerError:
            await response.aclose()
            raise

    async def _send(self, headers: Mapping[str, str]) -> Response:
        if (direct := self._direct) is not None:
            try:
                return await self._session.send(self._call(direct, headers))
            except RegistryError as error:
                if self._direct == direct:
                    self._direct = None
                if error.status not in _EXPIRED:
                    raise
        target = urljoin(await self._session.base_url(self.name), f"blobs/{self._digest}")
        response = await self._session.send(self._call(target, headers))
        self._direct = response.url if response.url != target else None
        return response

    def _call(self, target: str, headers: Mapping[str, str]) -> Call:
        return Call("GET", target, self.name, _ANSWERS, headers=headers)

    def _check(self, response: Response, place: int, end: int, skip_limit: int) -> int:
        """The number of bytes to skip; raises when the answer is not about the bytes asked for."""
        if (encoding := response.header("Content-Encoding")) not in ("", "identity"):
            raise self._mistake(response, f"an encoded body ({redact_text(encoding, 40)})")
        total = response.header("Content-Range")
        if response.status == 416:
            raise self._mistake(
                response, f"416, as if the range were not in the blob ({redact_text(total, 60)})"
            )
        if response.status == 206:
            expected = f"bytes {place}-{end - 1}/{self._size}"
            if " ".join(total.split()).lower() != expected:
                raise self._mistake(response, f"range {redact_text(total, 60)!r}, not {expected!r}")
            return 0
        if response.length not in (None, self._size):
            raise self._mistake(response, f"a blob of {response.length} bytes, not {self._size}")
        if place > skip_limit:
            raise RegistryError(
                f"{self.name}: GET {self._host(response)}: sends the whole blob when asked for a range",
                hint="this registry or a cache before it does not do ranges, which reading lazily needs",
                status=200,
            )
        return place

    def _mistake(self, response: Response, got: str) -> IntegrityError:
        return IntegrityError(f"{self.name}: GET {self._host(response)}: got {got}")

    def _outside(self, text: str) -> IntegrityError:
        return IntegrityError(f"{self.name}: range {text} is outside the blob of {self._size} bytes")

    @staticmethod
    def _host(response: Response) -> str:
        return origin_of(response.url).host
