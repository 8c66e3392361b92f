"""Small blobs kept on disk under their digests: manifests, configs, indexes and their sections.

Invariant: what is read has the digest it was asked for; a file that does not is dropped. Writes are atomic.
Anything the disk does wrong, on reading or writing, costs the copy and never the caller.

Not for: layer data (:mod:`veneer.store`), or for keeping within a quota: these are kilobytes an image.
"""

import contextlib
import logging
import os
import tempfile
from pathlib import Path

from veneer.errors import IntegrityError
from veneer.oci.digest import Digest

__all__ = ["DigestFiles", "read_file", "replace_file"]

_log = logging.getLogger(__name__)


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in the place of another one, or of none, at once and whole. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_file(path: Path, limit: int) -> bytes | None:
    """A file, or its first ``limit`` bytes and one more; None if there is none, or if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("cannot read %s: %s", path, error)
        return None


class DigestFiles:
    """One directory of files ``ALGORITHM/HEX``. May be used by any thread, and by several processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, digest: Digest, limit: int) -> bytes | None:
        """The bytes of this digest, of which there are at most ``limit``, or None."""
        path = self._path(digest)
        if (data := read_file(path, limit)) is None:
            return None
        try:
            digest.check(data, str(path))
        except IntegrityError as error:
            _log.warning("dropped a damaged file: %s", error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return data

    def save(self, digest: Digest, data: bytes) -> None:
        """Keep ``data``, whose digest the caller has checked, unless a file of that name and size is there.

        Whether that one is damaged is found out when it is read.
        """
        path = self._path(digest)
        with contextlib.suppress(OSError):
            if path.stat().st_size == len(data):
                return
        try:
            replace_file(path, data)
        except OSError as error:
            _log.warning("cannot keep %s: %s", path, error)

    def any(self) -> bool:
        """Whether there is a directory at all: a hint that something is kept here."""
        return self._directory.is_dir()

    def _path(self, digest: Digest) -> Path:
        return self._directory / digest.algorithm / digest.hex
