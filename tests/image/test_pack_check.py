"""Packs held against what they say they are: every kind of lie and damage is named, and only that."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.prefetch.test_pack import LAYERS, device_of
from veneer.errors import IntegrityError
from veneer.image.pack_check import PackCheck
from veneer.image.packs import FoundPack, NamedPack, check_fits
from veneer.index.model import Device
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER, VENEER_PACK_INDEX
from veneer.prefetch.pack import PackIndex, Place
from veneer.source.layout_file import FileBlob

LAYER = os.urandom(16 << 10)
#: Out of the middle of the layer, the later part first; two spans of a pack.
PLACES = (Place(LAYERS[0], 1024, 4096, 4096), Place(LAYERS[0], 8192, 4096, 0))
PACK = LAYER[8192:12288] + LAYER[1024:5120]
INDEX = PackIndex(device_of(PACK, span=4096), PLACES)


def found(index: PackIndex = INDEX) -> FoundPack:
    named = NamedPack("default", "local", Descriptor(VENEER_PACK_INDEX, Digest.of(b"index"), 5))
    return FoundPack(named, index, FileBlob(Path("/nowhere"), "pack", len(PACK)), b"index")


def problems(data: bytes, layer: bytes = LAYER, index: PackIndex = INDEX, step: int = 1500) -> list[str]:
    """What is found out when the layer is read in steps that begin and end anywhere."""
    check = PackCheck(found(index).named)
    check.load(found(index), data)
    for offset in range(0, len(layer), step):
        check.compare(LAYERS[0], offset, layer[offset : offset + step])
        check.compare(LAYERS[1], offset, bytes(step))
    return check.problems


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("step", [100, 1500, 4096, len(LAYER)])
def test_a_pack_of_these_bytes_is_right(step: int) -> None:
    assert problems(PACK, step=step) == []


@pytest.mark.parametrize("step", [100, 1500, 4096, len(LAYER)])
@pytest.mark.parametrize("at", [1024, 3000, 5119, 8192, 12287])
def test_every_byte_is_compared(at: int, step: int) -> None:
    (problem,) = problems(PACK, flipped(LAYER, at), step=step)
    assert "other bytes" in problem


@pytest.mark.parametrize("at", [0, 1023, 5120, 8191, 12288])
def test_what_is_not_in_the_pack_says_nothing_about_it(at: int) -> None:
    assert problems(PACK, flipped(LAYER, at)) == []


def test_damage_is_named_once_and_the_rest_is_compared() -> None:
    damaged = problems(flipped(PACK, 0))
    assert len(damaged) == 2, "the blob, and the span; what cannot be read is not compared"
    assert all("expected sha256" in problem for problem in damaged)
    assert sum("other bytes" in problem for problem in problems(flipped(PACK, 0), flipped(LAYER, 1024))) == 1


def test_a_false_digest_of_the_whole_is_found_out() -> None:
    device = replace(INDEX.device, diff_id=Digest.of(b"something else"))
    (problem,) = problems(PACK, index=PackIndex(device, PLACES))
    assert "plain bytes" in problem


def test_a_pack_may_not_go_beyond_the_end_of_a_layer() -> None:
    def layer(size: int) -> list[Device]:
        return [replace(device_of(LAYER[:size], OCI_LAYER), diff_id=LAYERS[0])]

    check_fits(found(), layer(12288))
    with pytest.raises(IntegrityError, match="after the end"):
        check_fits(found(), layer(12287))
    with pytest.raises(IntegrityError, match="stale"):
        check_fits(found(), [])
