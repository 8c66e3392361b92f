"""Mounts a metadata image over device files, with fsopen and its like: mount(8) would make a loop device."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from veneer.erofs.writer import ErofsImage

_LIBC = ctypes.CDLL(None, use_errno=True)
_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_CLOEXEC = 1
_EMPTY_PATH = 4
_AT_FDCWD = -100
_DETACH = 2


def _call(number: int, *arguments: object) -> int:
    result = int(_LIBC.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@contextmanager
def mounted(image: Path, devices: Sequence[Path], target: Path) -> Iterator[Path]:
    """Mount ``image`` read-only on ``target`` over ``devices``."""
    context = _call(_FSOPEN, b"erofs", _CLOEXEC)
    try:
        _call(_FSCONFIG, context, _SET_STRING, b"source", os.fsencode(image), 0)
        for device in devices:
            _call(_FSCONFIG, context, _SET_STRING, b"device", os.fsencode(device), 0)
        _call(_FSCONFIG, context, _SET_FLAG, b"ro", None, 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        mount = _call(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        _call(_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(target), _EMPTY_PATH)
    finally:
        os.close(mount)
    try:
        yield target
    finally:
        if _LIBC.umount2(os.fsencode(target), _DETACH):
            raise OSError(ctypes.get_errno(), f"cannot unmount {target}")


def tail_bytes(image: ErofsImage, devices: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of everything that the tail holds."""
    for copy in image.copies:
        yield copy.offset, devices[copy.device][copy.source : copy.source + copy.length]


@contextmanager
def mounted_image(image: ErofsImage, devices: Sequence[bytes], directory: Path) -> Iterator[Path]:
    """Write the image and the devices (all but the tail) to files below ``directory``, and mount them."""
    source, target = directory / "image.erofs", directory / "mount"
    source.write_bytes(image.data)
    target.mkdir()
    paths = []
    for number, slot in enumerate(image.devices):
        path = directory / f"device{number}"
        with path.open("wb") as file:
            if number == image.tail:
                for offset, data in tail_bytes(image, devices):
                    file.seek(offset)
                    file.write(data)
            else:
                file.write(devices[number])
            file.truncate(slot.blocks * 512)
        paths.append(path)
    with mounted(source, paths, target):
        yield target
