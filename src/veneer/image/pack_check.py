"""Checks that a pack is what it says: as a blob, by spans, as a whole, and byte by byte the same as its layers.

Whoever reads layers shows their bytes to the checks, piece by piece.
"""

from bisect import bisect_right
from collections import defaultdict
from pathlib import Path

import trio

from veneer.codec import check_and_decode
from veneer.errors import IntegrityError, NotFound, UnsupportedFormat
from veneer.image.contents import Contents
from veneer.image.image import Image
from veneer.image.packs import FoundPack, NamedPack, annotated_packs, check_fits, local_packs, open_pack
from veneer.oci.digest import Digest
from veneer.prefetch.pack import Place

__all__ = ["PackCheck", "pack_checks"]


async def pack_checks(image: Image, cache_dir: Path) -> "list[PackCheck]":
    """A check for each pack that the image's manifest names or that this host made, its bytes read.

    Raises IntegrityError when the manifest names packs in a way that nobody can read.
    """
    contents = Contents(image.repository, cache_dir / "blobs")
    names = [*annotated_packs(image.manifest)]
    names += await trio.to_thread.run_sync(local_packs, cache_dir, image.manifest.digest)
    checks = []
    for named in names:
        check = PackCheck(named)
        checks.append(check)
        try:
            found = await open_pack(contents, image.manifest, cache_dir, named)
            check_fits(found, image.devices)
            data = await found.source.read(0, found.source.size)
            await trio.to_thread.run_sync(check.load, found, data)
        except (IntegrityError, NotFound, UnsupportedFormat) as error:
            check.problem(error.message)
    return checks


class PackCheck:
    """The check of one pack. Holds all of it, which is bounded; may be used by several threads.

    Attributes:
        named: which pack.
        problems: what is wrong with it.
        size: plain bytes that were checked.
    """

    def __init__(self, named: NamedPack) -> None:
        self.named = named
        self.problems: list[str] = []
        self.size = 0
        self._plain = bytearray()
        #: Ranges that could not be decoded, and so not be compared.
        self._bad: list[tuple[int, int]] = []
        self._places: defaultdict[Digest, list[Place]] = defaultdict(list)

    def problem(self, message: str) -> None:
        """Note that something is wrong."""
        self.problems.append(message)

    def load(self, found: FoundPack, data: bytes) -> None:
        """Take the blob, and check it by itself."""
        device, name = found.index.device, found.source.name
        for place in found.index.places:
            self._places[place.layer].append(place)
        try:
            device.blob.digest.check(data, name)
        except IntegrityError as error:
            self.problem(error.message)
        for span in device.spans:
            stored = memoryview(data)[span.stored_offset : span.stored_offset + span.stored_length]
            try:
                self._plain += check_and_decode(span, stored, f"{name}: span {span.number}")
                self.size += span.length
            except IntegrityError as error:
                self.problem(error.message)
                self._plain += bytes(span.length)
                self._bad.append((span.offset, span.offset + span.length))
        if not self._bad:
            try:
                device.diff_id.check(self._plain, f"{name}: plain bytes")
            except IntegrityError as error:
                self.problem(error.message)

    def compare(self, layer: Digest, offset: int, plain: bytes) -> None:
        """Hold verified bytes of a layer against what the pack says they are."""
        places, end = self._places.get(layer, []), offset + len(plain)
        first = max(0, bisect_right(places, offset, key=lambda place: place.offset) - 1)
        for place in places[first:]:
            if place.offset >= end:
                break
            low, high = max(offset, place.offset), min(end, place.offset + place.length)
            at = place.at + low - place.offset
            if low >= high or any(start < at + high - low and at < stop for start, stop in self._bad):
                continue
            if self._plain[at : at + high - low] != plain[low - offset : high - offset]:
                self.problem(
                    f"the pack {self.named.descriptor.digest} has other bytes at {at} than {layer} at {low}"
                )
