"""Make a cache look as an earlier boot would have left it on a disk that lost some of what was written last.

Wherever this boot is named, in any spelling, another one is; and some pages, records of maps and metadata
images hold something else than what was written.
"""

import os
import random
from collections import Counter
from pathlib import Path

__all__ = ["as_before_a_boot"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PAGE = 4096
#: Of the pages that data files have, how many are damaged; and how often other files are.
_DAMAGED_PAGES = 0.02
_DAMAGED_MAPS = 0.1
_DAMAGED_METADATA = 0.2
#: Where the header of a presence map ends; what belongs to a device is not what is tested here.
_MAP_HEADER = 512


def as_before_a_boot(cache_dir: Path, rng: random.Random) -> "Counter[str]":
    """Change the files of a cache that nobody has open; what was done, counted."""
    done: Counter[str] = Counter()
    text = _BOOT_ID.read_text().strip()
    plain = bytes.fromhex(text.replace("-", ""))
    spellings = (plain, text.encode(), text.replace("-", "").encode())
    for path in sorted(path for path in cache_dir.rglob("*") if path.is_file()):
        if path.name == "data":
            done["pages damaged"] += _damage_pages(path, rng)
            continue
        before = path.read_bytes()
        after = before
        for spelling in spellings:
            after = after.replace(spelling, _other(spelling))
        done["boot ids replaced"] += after != before
        if path.name == "map" and rng.random() < _DAMAGED_MAPS:
            after = _damage(after, rng, _MAP_HEADER)
            done["maps damaged"] += 1
        elif path.parent.name == "erofs" and rng.random() < _DAMAGED_METADATA:
            after = _damage(after, rng, 0)
            done["metadata damaged"] += 1
        if after != before:
            # In place: maps know their data file, and the kernel's locks their inode.
            with open(path, "r+b") as file:
                file.write(after)
    return done


def _other(spelling: bytes) -> bytes:
    """Another boot id in the same spelling."""
    if len(spelling) == 16:
        return bytes(byte ^ 0x11 for byte in spelling)
    return spelling.translate(bytes.maketrans(b"0123456789abcdef", b"123456789abcdef0"))


def _damage(data: bytes, rng: random.Random, start: int) -> bytes:
    if len(data) <= start:
        return data
    changed = bytearray(data)
    at = rng.randrange(start, len(changed))
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _damage_pages(path: Path, rng: random.Random) -> int:
    """Overwrite some pages that were written with zeros or other bytes."""
    count = 0
    with open(path, "r+b") as file:
        fd, size, offset = file.fileno(), path.stat().st_size, 0
        while offset < size:
            try:
                start = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError:
                break  # nothing but a hole is left
            offset = os.lseek(fd, start, os.SEEK_HOLE)
            for page in range(start - start % _PAGE, offset, _PAGE):
                if rng.random() < _DAMAGED_PAGES:
                    length = min(_PAGE, size - page)
                    os.pwrite(fd, bytes(length) if rng.random() < 0.5 else rng.randbytes(length), page)
                    count += 1
    return count
