"""Devices that arrive as a whole: one rename makes them, and nothing of what never arrived remains."""

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from veneer.errors import CacheError
from veneer.formats.records import SPAN_SIZE, plain_device
from veneer.index.model import Device
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER_GZIP
from veneer.store.cache import DeviceCache
from veneer.store.intake import sweep_arriving
from veneer.store.presence import Form

DATA = os.urandom(2 * SPAN_SIZE + 777)
PIECES = [DATA[at : at + SPAN_SIZE] for at in range(0, len(DATA), SPAN_SIZE)]
DIGESTS = [hashlib.sha256(piece).digest() for piece in PIECES]


def device() -> Device:
    layer = Descriptor(OCI_LAYER_GZIP, Digest.of(b"stored"), 6)
    return plain_device(layer, Digest.of(DATA), len(DATA), DIGESTS)


def take_in(cache: DeviceCache) -> None:
    with cache.intake("layer x") as intake:
        for piece in PIECES:
            intake.append(piece)
        intake.commit(device(), DIGESTS)


def arriving(directory: Path) -> list[Path]:
    return list((directory / "devices").glob(".arriving-*"))


def test_a_committed_device_is_complete_and_counted(tmp_path: Path) -> None:
    cache = DeviceCache(tmp_path, 1 << 30)
    assert not cache.is_at_hand(device())
    take_in(cache)
    assert cache.is_at_hand(device())
    assert cache.count() == len(DATA)
    assert not arriving(tmp_path)
    file = cache.open(device(), Form.PLAIN)
    assert file is not None
    assert file.map.complete
    assert file.read(0, len(DATA)) == DATA
    assert file.verify(range(3)).right == 3
    cache.close()


def test_what_is_not_committed_is_deleted_and_not_counted(tmp_path: Path) -> None:
    cache = DeviceCache(tmp_path, 1 << 30)
    with cache.intake("layer x") as intake:
        intake.append(DATA)
        assert cache.count() == len(DATA)
        assert not cache.has_room(cache.quota - len(DATA))
    assert not arriving(tmp_path)
    assert cache.count() == 0
    assert cache.has_room(cache.quota)
    cache.close()


def test_a_device_that_is_there_in_part_is_completed(tmp_path: Path) -> None:
    cache = DeviceCache(tmp_path, 1 << 30)
    take_in(cache)
    file = cache.open(device(), Form.PLAIN)
    assert file is not None
    cache.evict(file, [0, 2])
    assert file.read(0, 1) is None
    assert not cache.is_at_hand(device())
    take_in(cache)
    assert file.read(0, len(DATA)) == DATA
    assert cache.has_room(cache.quota - len(DATA))
    assert not cache.has_room(cache.quota - len(DATA) + 1)
    cache.close()


def test_a_device_larger_than_the_quota_is_refused(tmp_path: Path) -> None:
    cache = DeviceCache(tmp_path, len(DATA) - 1)
    with pytest.raises(CacheError, match="more than the cache quota") as caught:
        take_in(cache)
    assert "--cache-quota" in (caught.value.hint or "")
    assert not arriving(tmp_path)
    cache.close()


def test_others_are_evicted_to_make_room(tmp_path: Path) -> None:
    cache = DeviceCache(tmp_path, len(DATA) + SPAN_SIZE)
    take_in(cache)
    with cache.intake("layer y") as intake:
        intake.append(DATA)
        assert not cache.is_at_hand(device())
    cache.close()


def test_a_disk_that_takes_less_than_it_was_given_gets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: len(data) // 2 + 1], at))
    cache = DeviceCache(tmp_path, 1 << 30)
    take_in(cache)
    file = cache.open(device(), Form.PLAIN)
    assert file is not None
    assert file.read(0, len(DATA)) == DATA
    cache.close()


def test_fewer_bytes_than_the_device_has_are_none(tmp_path: Path) -> None:
    cache = DeviceCache(tmp_path, 1 << 30)
    with cache.intake("layer x") as intake:
        intake.append(DATA[:-1])
        with pytest.raises(ValueError, match="bytes for a device of"):
            intake.commit(device(), DIGESTS)
    assert not cache.is_at_hand(device())
    cache.close()


@pytest.mark.parametrize(("module", "name"), [(os, "open"), (fcntl, "flock")])
def test_whoever_is_taken_for_dead_while_it_begins_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    """Between the making of the directory and the locking of it, it looks like what a killed writer left."""
    cache = DeviceCache(tmp_path, 1 << 30)
    real = getattr(module, name)

    def late(*args: object) -> object:
        monkeypatch.undo()
        assert len(arriving(tmp_path)) == 1
        sweep_arriving(tmp_path / "devices")
        assert not arriving(tmp_path)
        return real(*args)

    monkeypatch.setattr(module, name, late)
    take_in(cache)
    assert cache.is_at_hand(device())
    assert not arriving(tmp_path)
    cache.close()


def test_what_was_killed_before_its_first_byte_goes_as_well(tmp_path: Path) -> None:
    (tmp_path / "devices/.arriving-1").mkdir(parents=True)
    DeviceCache(tmp_path, 1 << 30).close()
    assert not arriving(tmp_path)


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DeviceCache(tmp_path, 1 << 30)

    def full(*_args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with cache.intake("layer x") as intake:
        intake.append(PIECES[0])
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(CacheError, match=r"layer x cannot be kept in .*No space left") as caught:
            intake.append(PIECES[1])
        monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert "make room" in (caught.value.hint or "")
    assert not arriving(tmp_path)
    cache.close()


def test_what_a_killed_writer_left_goes_with_the_next_start_and_what_a_living_one_writes_does_not(
    tmp_path: Path,
) -> None:
    program = (
        "import os, sys, signal; from pathlib import Path; from veneer.store.cache import DeviceCache\n"
        "intake = DeviceCache(Path(sys.argv[1]), 1 << 30).intake('layer x'); intake.append(bytes(1 << 20))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ours = DeviceCache(tmp_path, 1 << 30)
    with ours.intake("layer y") as intake:
        intake.append(DATA)
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
        assert len(arriving(tmp_path)) == 2
        other = DeviceCache(tmp_path, 1 << 30)
        assert len(arriving(tmp_path)) == 1
        other.close()
        intake.append(b"x")
    ours.close()
