"""Upload sessions: bytes arrive in one or many requests, and become a blob only when the digest is right.

The file of a session is a staged file inside the layout that the blob is for, so finishing is a rename. It is
removed when the session is cancelled, fails verification, is forgotten by its client, or the server stops.
"""

import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from veneer.errors import IntegrityError
from veneer.oci.digest import Digest, Hasher
from veneer.serve.api import APIError
from veneer.serve.storage import StoredRepository
from veneer.source.layout_file import StagedFile

__all__ = ["Upload", "Uploads"]

#: Bytes collected before they are hashed and written in a thread: one hop for many small reads.
WRITE_SIZE = 1 << 20
#: Sessions at a time; each holds an open file.
MAX_SESSIONS = 500
#: Seconds after which a session that nobody continues is dropped.
FORGOTTEN_S = 3600.0


@dataclass(slots=True)
class Upload:
    """One session; ``offset`` bytes have arrived.

    ``lock`` is held by whoever writes, finishes or drops it, for its file is written in threads.
    """

    identity: str
    repository: StoredRepository
    algorithm: str
    file: StagedFile
    hasher: Hasher
    offset: int = 0
    used: float = 0.0
    lock: trio.Lock = field(default_factory=trio.Lock)

    async def receive(self, chunks: AsyncIterator[bytes]) -> None:
        """Append bytes as they arrive. What came before a fault counts, so that a client can resume."""
        pending = bytearray()
        try:
            async for chunk in chunks:
                pending += chunk
                if len(pending) >= WRITE_SIZE:
                    data, pending = pending, bytearray()
                    await trio.to_thread.run_sync(self._write, bytes(data))
        finally:
            self._write(bytes(pending))

    def _write(self, data: bytes) -> None:
        self.hasher.update(data)
        self.file.write(data)
        self.offset += len(data)

    def restart(self, algorithm: str) -> None:
        """Choose the hash; possible only while the session is empty."""
        if algorithm == self.algorithm:
            return
        if self.offset:
            raise APIError(
                "DIGEST_INVALID",
                f"this upload is hashed with {self.algorithm}; begin it with digest-algorithm={algorithm}",
            )
        self.algorithm, self.hasher = algorithm, hashlib.new(algorithm)


class Uploads:
    """All sessions of one server."""

    def __init__(self) -> None:
        self._sessions: dict[str, Upload] = {}

    async def begin(self, repository: StoredRepository, algorithm: str) -> Upload:
        """A new, empty session."""
        now = trio.current_time()
        for upload in list(self._sessions.values()):
            if now - upload.used > FORGOTTEN_S and not upload.lock.locked():
                self.drop(upload)
        if len(self._sessions) >= MAX_SESSIONS:
            raise APIError("TOOMANYREQUESTS", "too many uploads at a time", headers=(("Retry-After", "5"),))
        await repository.layout.prepare()
        file = StagedFile(repository.path)
        identity = secrets.token_hex(16)
        upload = Upload(identity, repository, algorithm, file, hashlib.new(algorithm), used=now)
        self._sessions[identity] = upload
        return upload

    def find(self, repository: str, identity: str) -> Upload:
        """The session of that name in that repository."""
        upload = self._sessions.get(identity)
        if upload is None or upload.repository.name != repository:
            raise APIError("BLOB_UPLOAD_UNKNOWN", f"there is no upload {identity[:64]!r} in {repository}")
        upload.used = trio.current_time()
        return upload

    async def finish(self, upload: Upload, digest: Digest) -> None:
        """Verify the bytes and give the blob its name; the session is over in any case."""
        try:
            digest.check_hash(upload.hasher, "the upload")
            target = upload.repository.blob_path(digest)
            await trio.to_thread.run_sync(upload.file.commit, target)
        except IntegrityError as error:
            raise APIError("DIGEST_INVALID", error.message) from error
        finally:
            self.drop(upload)

    def drop(self, upload: Upload) -> None:
        """End a session and remove its file."""
        self._sessions.pop(upload.identity, None)
        upload.file.discard()

    def close(self) -> None:
        """End all sessions."""
        for upload in list(self._sessions.values()):
            self.drop(upload)
