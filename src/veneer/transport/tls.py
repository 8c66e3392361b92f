"""Whom connections trust: the system's certificate authorities, and those that the settings add.

Reading those of the system takes some 25 ms. So it is done for the first connection, never for an image whose
documents are all here; and one context serves the whole process, until a file that it was made of changes.
"""

import os
import ssl
from functools import lru_cache
from pathlib import Path

from veneer.errors import UsageError

__all__ = ["check_ca_file", "tls_context"]

#: What a file is recognised by: device, inode, size and time of change. None when it is not there.
_Stamp = tuple[int, int, int, int] | None


def check_ca_file(path: Path) -> None:
    """Raise UsageError unless the file holds certificates."""
    _add(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), path)


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """The context for all connections that trust ``ca_file`` besides the system; it is shared, never changed.

    Raises UsageError.
    """
    system = ssl.get_default_verify_paths()
    return _context(ca_file, tuple(map(_stamp, (ca_file, system.cafile, system.capath))))


@lru_cache(maxsize=8)  # those of changed files are of no use any more
def _context(ca_file: Path | None, _stamps: tuple[_Stamp, ...]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file is not None:
        _add(context, ca_file)
    return context


def _stamp(path: Path | str | None) -> _Stamp:
    if path is None:
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _add(context: ssl.SSLContext, path: Path) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except OSError as error:
        why = "not in PEM format" if isinstance(error, ssl.SSLError) else error.strerror
        raise UsageError(
            f"cannot read certificates from {path}: {why}",
            hint="--ca-file takes a file of certificates in PEM format",
        ) from error
