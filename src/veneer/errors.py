"""The whole error tree, and the two numbers it is projected on: exit codes and errnos.

Every failure that veneer foresees is one of these classes; anything else that escapes is a bug.

    VeneerError                 1    .hint, .temporary, .exit_code, .errno
    ├─ UsageError               2    the request itself is wrong (a bad reference, option or setting)
    ├─ RegistryError           10    a registry, or an object store behind it, did not do its part
    │   ├─ NotFound            11
    │   ├─ Unauthorized        12
    │   ├─ RateLimited         13    temporary, carries retry_after_s
    │   └─ Unavailable         14    temporary: refused, reset, stalled, timed out, 5xx
    ├─ IntegrityError          20    bytes are not what they were promised to be
    ├─ UnsupportedFormat       22    well-formed, but nothing here can read it
    ├─ CacheError              30    the local cache cannot be used (a full disk: only where it is needed)
    └─ MountError              40

A message says what failed, on what and why, in lower case and without a full stop; ``hint`` says what to
do. Neither ever holds a secret: whoever builds a message from a URL or header redacts it first.
"""

import errno

__all__ = [
    "CacheError",
    "IntegrityError",
    "MountError",
    "NotFound",
    "RateLimited",
    "RegistryError",
    "Unauthorized",
    "Unavailable",
    "UnsupportedFormat",
    "UsageError",
    "VeneerError",
]


class VeneerError(Exception):
    """Base of every foreseen failure.

    Args:
        message: what failed, on what and why.
        hint: what the user can do about it, or None.
    """

    exit_code = 1
    #: What a reader of a mounted file sees when this error ends a read.
    errno = errno.EIO
    #: Whether the same request may succeed later without anybody changing anything.
    temporary = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(VeneerError):
    """The request is wrong: a malformed reference, an impossible option, a bad setting."""

    exit_code = 2
    errno = errno.EINVAL


class RegistryError(VeneerError):
    """A registry answered with something that cannot be used.

    Args:
        message: what failed, with host, method and the digest or tag concerned.
        hint: what the user can do about it, or None.
        status: the HTTP status, when there was an answer at all.
        codes: the error codes of the distribution API that the body named, in order.
    """

    exit_code = 10

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int | None = None,
        codes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.codes = codes


class NotFound(RegistryError):
    """The repository, manifest or blob does not exist, or is hidden from these credentials."""

    exit_code = 11


class Unauthorized(RegistryError):
    """Credentials are missing, wrong or not enough."""

    exit_code = 12


class RateLimited(RegistryError):
    """The registry asks to slow down, and kept asking for longer than the deadline allowed."""

    exit_code = 13
    temporary = True

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int | None = 429,
        codes: tuple[str, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, hint=hint, status=status, codes=codes)
        self.retry_after_s = retry_after_s


class Unavailable(RegistryError):
    """The registry could not be reached, or gave up half-way: worth trying again later."""

    exit_code = 14
    temporary = True

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int | None = None,
        codes: tuple[str, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, hint=hint, status=status, codes=codes)
        self.retry_after_s = retry_after_s


class IntegrityError(VeneerError):
    """Bytes are not what a digest, a size or a format promised; they have been dropped."""

    exit_code = 20


class UnsupportedFormat(VeneerError):
    """The input is well-formed, but of a kind or version that this veneer cannot read."""

    exit_code = 22

    @classmethod
    def of_version(cls, what: str, found: int, known: int) -> "UnsupportedFormat":
        """What conversion made, in version ``found`` of a format that is read in version ``known``."""
        older = "convert the image again with this version of veneer"
        hint = older if found < known else "a newer veneer may read it"
        return cls(f"{what}: version {found} of the format", hint=hint)


class CacheError(VeneerError):
    """The local cache directory cannot be used at all, or the disk is full and no reader can do without it.

    Args:
        message: what failed, on what and why.
        hint: what the user can do about it, or None.
        errno: what a reader of a mounted file sees, if that is not EIO.
    """

    exit_code = 30

    def __init__(self, message: str, *, hint: str | None = None, errno: int = errno.EIO) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class MountError(VeneerError):
    """Mounting or unmounting failed, or this machine cannot do it."""

    exit_code = 40
