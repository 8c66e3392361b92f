"""The kernel's newer mount interface: fsopen(2), fsmount(2), open_tree(2) and their kin, through ctypes.

It takes any number of parameters where mount(2) has room for one page of them, says why it refuses, and makes
mounts that are in no directory. Every function here blocks; an event loop calls them in a thread.
"""

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

__all__ = ["attach", "can_clone", "clone", "unattached"]

_libc = ctypes.CDLL(None, use_errno=True)
#: System calls of Linux 5.2; from then on numbers are the same on all architectures but alpha.
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 428, 429, 430, 431, 432
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC, _AT_EMPTY_PATH = 1, os.O_CLOEXEC, 0x1000
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC = 1, 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_EMPTY_PATH = 4
_AT_FDCWD = -100
#: Longest message of the kernel about a mount that it refuses.
_MESSAGE = 4096


@contextmanager
def unattached(fstype: str, parameters: Iterable[tuple[str, str | Path | None]] = ()) -> Iterator[int]:
    """The descriptor of a new mount; it goes when the context ends, unless :func:`attach` has put it somewhere.

    Args:
        fstype: of the file system.
        parameters: names and values, in this order; None for a flag.

    Raises OSError, with what the kernel said in its ``strerror``.
    """
    mount = _mount(fstype, parameters)
    try:
        yield mount
    finally:
        os.close(mount)


def attach(mount: int, target: Path) -> None:
    """Put a mount on a directory, without following a symbolic link at its end. Raises OSError."""
    _call(_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(target), _EMPTY_PATH)


@contextmanager
def clone(mount: int) -> Iterator[int]:
    """The descriptor of another mount of the same file system, which is in no directory either.

    It goes when the context ends, unless :func:`attach` has put it somewhere. Raises OSError; EINVAL before
    Linux 6.15, which :func:`can_clone` says beforehand.
    """
    copy = _call(_OPEN_TREE, mount, b"", _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_EMPTY_PATH)
    try:
        yield copy
    finally:
        os.close(copy)


@cache
def can_clone() -> bool:
    """Whether the kernel clones mounts that are in no directory."""
    try:
        with unattached("tmpfs") as mount, clone(mount):
            return True
    except OSError:
        return False


def _mount(fstype: str, parameters: Iterable[tuple[str, str | Path | None]]) -> int:
    context = _call(_FSOPEN, fstype.encode(), _FSOPEN_CLOEXEC)
    try:
        for name, value in parameters:
            if value is None:
                _call(_FSCONFIG, context, _SET_FLAG, name.encode(), None, 0)
            else:
                _call(_FSCONFIG, context, _SET_STRING, name.encode(), os.fsencode(value), 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    except OSError as error:
        number = error.errno or 0
        raise OSError(number, "; ".join([os.strerror(number), *_messages(context)])) from error
    finally:
        os.close(context)


def _messages(context: int) -> Iterator[str]:
    while True:
        try:
            # The first word is a letter for its level.
            yield os.read(context, _MESSAGE).decode(errors="replace").partition(" ")[2].strip()
        except OSError:
            return


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
