"""Replays of a profile: exactly its ranges, verified, by store and by mount."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.daemon.test_commands import veneer
from tests.daemon.test_packs import profile_of
from veneer.errors import IntegrityError, UsageError
from veneer.image import Image, open_image
from veneer.lab.replay import Step, file_pieces, replay_image, steps_of
from veneer.oci.digest import Digest
from veneer.prefetch.profile import Profile, Use
from veneer.settings import Settings
from veneer.testing.trees import node_at

pytestmark = [pytest.mark.root]


async def opened_profile(
    image: str, settings: Settings, *ranges: tuple[bytes, int, int]
) -> tuple[Profile, str]:
    """A profile of ranges of files, and the SHA-256 of what they hold."""
    async with open_image(image, settings) as opened:
        await opened.load()
        return profile_of(opened, *ranges), opened.name


def busybox() -> bytes:
    return Path("/bin/busybox").read_bytes()


async def test_a_store_reads_exactly_the_ranges_in_their_order(settings: Settings, image: str) -> None:
    ranges = [(b"bin/busybox", 100_000, 300_000), (b"etc/hello", 0, 6), (b"bin/busybox", 0, 4096)]
    profile, _ = await opened_profile(image, settings, *ranges)
    replayed, counts, record = await replay_image(image, profile, settings, think=0)
    program = busybox()
    expected = program[100_000:400_000] + b"hello\n" + program[:4096]
    assert replayed.bytes_read == len(expected)
    assert replayed.sha256 == hashlib.sha256(expected).hexdigest()
    assert replayed.unmapped == 0
    assert counts["requests"] == len(record.ranges) > 0
    assert [(read.offset, read.length) for read in record.reads] == [
        (step.offset, step.length) for step in await steps_in(image, settings, profile)
    ]
    again, counts, _ = await replay_image(image, profile, settings, think=0)
    assert (again.sha256, counts["requests"]) == (replayed.sha256, 0)


async def steps_in(image: str, settings: Settings, profile: Profile, think: float = 0.0) -> Sequence[Step]:
    async with open_image(image, settings) as opened:
        return steps_of(profile, opened, think=think)


@pytest.mark.fuse
@pytest.mark.parametrize("backend", ["erofs-fanotify", "fuse"])
def test_a_mount_reads_the_same_bytes(workplace: Path, settings: Settings, image: str, backend: str) -> None:
    ranges = [(b"bin/busybox", 100_000, 300_000), (b"etc/hello", 0, 6)]
    profile, _ = trio.run(lambda: opened_profile(image, settings, *ranges))
    # As recorded: aligned to pages, with a header between the files.
    hello = profile.uses[1]
    header = Use(hello.layer, hello.offset - 512, 512, 0.0, 0.0)
    profile = replace(profile, uses=(profile.uses[0], header, hello))
    file, timing = workplace / "profile.json", workplace / "timing.json"
    file.write_bytes(profile.to_json())
    options = ("--backend", backend, "--think", "0", "--timing-record", str(timing), "--json")
    done = veneer(settings, "trace", "replay", *options, str(file), image)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = busybox()[100_000:400_000] + b"hello\n"
    assert found["sha256"] == hashlib.sha256(expected).hexdigest()
    assert (found["bytes_read"], found["unmapped"], found["backend"]) == (300_006, 512, backend)
    assert found["requests"] > 0
    assert json.loads(timing.read_text())["bytes_fetched"] == found["bytes_fetched"]
    assert not list((workplace / "run/mounts").glob("[!.]*"))


async def test_wrong_bytes_end_a_replay(workplace: Path, settings: Settings, image: str) -> None:
    profile, _ = await opened_profile(image, settings, (b"large", 0, 1 << 30))
    async with open_image(image, settings) as opened:
        blob = workplace / "layout/blobs" / str(opened.manifest.layers[0].digest).replace(":", "/")
    data = bytearray(blob.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    blob.write_bytes(data)
    with pytest.raises(IntegrityError):
        await replay_image(image, profile, settings, think=0)


async def test_think_times_are_what_the_program_did_between_its_waits(settings: Settings, image: str) -> None:
    async with open_image(image, settings) as opened:
        layer = opened.devices[0].diff_id
        uses = [
            (0, 4096, 50.0, 10.0),
            (4096, 4096, 65.0, 0.0),
            (8192, 300_000, 60.0, 40.0),
            (400_000, 512, 130.0, 0.0),
        ]
        profile = Profile("default", "", (), 1, tuple(Use(layer, *use) for use in uses))
        steps = steps_of(profile, opened, think=2.0)
    assert [round(step.think_s, 6) for step in steps] == [0.1, 0.01, 0.0, 0.0, 0.0, 0.06]
    assert sum(step.length for step in steps) == profile.size
    assert max(step.length for step in steps) == 128 << 10


async def test_a_profile_of_another_image_is_refused(settings: Settings, image: str) -> None:
    async with open_image(image, settings) as opened:
        stranger = Profile("default", "", (), 1, (Use(Digest.of(b"x"), 0, 1, 0.0, 0.0),))
        size = opened.devices[0].spans.size
        beyond = Profile("default", "", (), 1, (Use(opened.devices[0].diff_id, size - 1, 2, 0.0, 0.0),))
        for profile in (stranger, beyond):
            with pytest.raises(UsageError, match="does not have"):
                steps_of(profile, opened)


async def test_pieces_of_files_are_where_the_device_has_them(settings: Settings, image: str) -> None:
    async with open_image(image, settings) as opened:
        index = await opened.load()
        pieces = file_pieces(index)
        node = node_at(index, b"large")
        assert node is not None
        (extent,) = index.extents(node)
        layer = opened.devices[0].diff_id
        whole = list(pieces(Step(0, layer, 0, opened.devices[0].spans.size)))
        assert sum(piece.length for piece in whole) == stored_bytes(opened)
        (piece,) = pieces(Step(0, layer, extent.offset + 5, 7))
        assert piece == (b"large", 5, 7)
        assert list(pieces(Step(0, layer, extent.offset - 512, 512))) == []


def stored_bytes(image: Image) -> int:
    index, seen, total = image.index, set(), 0
    for _, node in index.walk():
        if node not in seen:
            seen.add(node)
            total += sum(extent.length for extent in index.extents(node))
    return total
