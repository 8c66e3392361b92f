"""Give a range of a sparse file back to the file system (fallocate(2) with FALLOC_FL_PUNCH_HOLE).

The standard library has no call for it. The range reads as zeros afterwards; the file keeps its size.
"""

import ctypes
import errno
import os
from functools import cache

__all__ = ["CANNOT_PUNCH", "punch"]

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
#: What file systems (or kernels) answer that cannot punch holes.
CANNOT_PUNCH = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    libc.fallocate64.restype = ctypes.c_int
    return libc


def punch(fd: int, offset: int, length: int) -> None:
    """Punch ``length`` bytes from ``offset`` out of ``fd``; raises OSError (see :data:`CANNOT_PUNCH`)."""
    while _libc().fallocate64(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))
