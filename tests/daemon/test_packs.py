"""Packs from profile to mount: made, named, found, and used by the daemon; and those that are not right."""

import json
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.cli.invoking import invoke
from tests.daemon.layouts import BUSYBOX, LARGE, busybox_layer, lazy_image, settings_in
from tests.daemon.test_daemon import (
    another_worker,
    kill,
    mount,
    processes,
    read,
    to_registry,
    umount,
)
from tests.waiting import eventually
from veneer.container.options import ContainerOptions
from veneer.convert.convert import convert
from veneer.convert.local import make_local_pack
from veneer.daemon import mounts
from veneer.daemon.client import RunRequest, RunResult, run_image
from veneer.daemon.lifecycle import stop_daemon
from veneer.daemon.report import PackReport
from veneer.errors import IntegrityError, UsageError
from veneer.events import Event, Notice
from veneer.image import Image, open_image
from veneer.image.packs import keep_local_pack, local_pack
from veneer.oci.digest import Digest
from veneer.prefetch.pack import PackIndex, decode_pack_index, encode_pack_index, in_order
from veneer.prefetch.profile import Profile, Use
from veneer.settings import Settings
from veneer.testing.actions import Hold
from veneer.testing.registry import ScriptedRegistry, scripted_registry
from veneer.testing.tars import TarItem, tar
from veneer.testing.trees import node_at
from veneer.verify import verify_image

pytestmark = [pytest.mark.root]

COMMAND = ("sh", "-c", "cat /etc/hello; tail -c 9000 /large | md5sum >/dev/null")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The backend that maps files to packs."""
    return replace(settings, backend="erofs-fanotify")


def profile_of(image: Image, *ranges: tuple[bytes, int, int], workload: str = "default") -> Profile:
    """Ranges of files."""
    uses = []
    for path, start, length in ranges:
        node = node_at(image.index, path)
        assert node is not None
        (extent,) = image.index.extents(node, start, length)
        uses.append(Use(image.devices[extent.device].diff_id, extent.offset, extent.length, 0.0, 0.0))
    return Profile(workload, "", (), 1, tuple(uses))


async def start_profile(text: str, settings: Settings, workload: str = "default") -> Profile:
    """What :data:`COMMAND` reads, and more of the large file."""
    async with open_image(text, settings) as image:
        await image.load()
        size = 20_000_000
        hot = [(b"bin/busybox", 0, size), (b"etc/hello", 0, size), (b"large", 1_000_000, size)]
        return profile_of(image, *hot, workload=workload)


async def packed(image: str, settings: Settings, *, workload: str = "default") -> str:
    """The same image with a pack, tagged ``packed``."""
    profile = await start_profile(image, settings, workload)
    target = image.removesuffix(":lazy") + ":packed"
    await convert(image, target, settings, profiles=[profile])
    return target


def the_pack(settings: Settings) -> PackReport:
    (found,) = mounts.list_mounts(settings.run_dir).mounts
    assert found.report is not None
    assert found.report.pack is not None
    return found.report.pack


def blobs_of(layout: Path, tag: str) -> dict[str, str]:
    """Digests of the image's layers, and of its pack's index and data."""
    index = json.loads((layout / "index.json").read_bytes())
    (entry,) = (
        one
        for one in index["manifests"]
        if one.get("annotations", {}).get("org.opencontainers.image.ref.name") == tag
    )
    manifest = json.loads((layout / "blobs" / entry["digest"].replace(":", "/")).read_bytes())
    (pack,) = json.loads(manifest["annotations"]["dev.veneer.pack"])
    found = {"layer": manifest["layers"][0]["digest"], "index": pack["digest"]}
    for one in index["manifests"]:
        document = json.loads((layout / "blobs" / one["digest"].replace(":", "/")).read_bytes())
        if document.get("artifactType", "").startswith("application/vnd.veneer.pack"):
            found["data"] = document["layers"][1]["digest"]
    return found


def fetched(registry: ScriptedRegistry, digest: str) -> list[str]:
    return [record.method for record in registry.requests if digest in record.path and record.method == "GET"]


def documents(registry: ScriptedRegistry) -> int:
    """Requests but for those that find out about the registry or open connections."""
    return sum(record.path != "/v2/" for record in registry.requests)


def started(name: str, settings: Settings) -> RunResult:
    result = run_image(RunRequest(name, ContainerOptions(arguments=COMMAND)), settings)
    assert result.exit_code == 0
    return result


def test_a_start_with_the_right_pack_asks_for_nothing_else(
    workplace: Path, settings: Settings, image: str
) -> None:
    async def main() -> None:
        await packed(image, settings_in(workplace / "elsewhere"))
        blobs = blobs_of(workplace / "layout", "packed")
        async with scripted_registry(to_registry(workplace)) as registry:
            name = f"{registry.host}/team/app:packed"
            result = await trio.to_thread.run_sync(started, name, settings)
            assert result.report is not None
            pack = result.report.pack
            assert pack is not None
            assert (pack.workload, pack.origin, pack.mapped) == ("default", "annotation", True)
            assert fetched(registry, blobs["layer"]) == []
            assert len(fetched(registry, blobs["index"])) == 1
            assert len(fetched(registry, blobs["data"])) == 1, "asked for with its index"
            assert result.report.store["requests"] > 0
            assert documents(registry) == 5, "manifest, config, index, the pack and its index"
            again = await trio.to_thread.run_sync(started, name, settings)
            assert again.report is not None
            assert again.report.store["requests"] == 0
            assert len(fetched(registry, blobs["data"])) == 1
            assert again.requests == 1, (
                "to see whether the tag has moved; the connection and its kind are known"
            )

    trio.run(main)


def resident(path: Path) -> int:
    """Bytes of a file in the kernel's page cache."""
    found = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", path], stdout=subprocess.PIPE, check=True
    )
    return int(found.stdout)


@pytest.mark.parametrize("again", [False, True])
def test_what_a_pack_has_is_in_memory_before_anybody_reads_it(
    workplace: Path, settings: Settings, image: str, again: bool
) -> None:
    target = trio.run(packed, image, settings)
    if again:
        # Its metadata image is kept, and so is what that says of files.
        mount(target, workplace / "first", settings)
        stop_daemon(settings.run_dir, force=True)
    mount(target, workplace / "mnt", settings)
    pages = (len(LARGE) - 1_000_000) // 4096 * 4096
    eventually(lambda: resident(workplace / "mnt/large") >= pages)
    assert resident(workplace / "mnt/bin/busybox") >= BUSYBOX.stat().st_size // 4096 * 4096
    assert resident(workplace / "mnt/large") < pages + (64 << 10), "nothing beside it"
    (found,) = mounts.list_mounts(settings.run_dir).mounts
    assert found.report is not None
    assert found.report.kernel["events"] == 0, "the kernel reads what is proven without asking"
    umount(workplace / "mnt", settings)


def ranges_of(registry: ScriptedRegistry, digest: str) -> list[tuple[int, int]]:
    """First and last byte of what was asked of a blob, in order of arrival."""
    asked = registry.asked("GET", digest)
    found = [re.fullmatch(r"bytes=(\d+)-(\d+)", record.header("range") or "") for record in asked]
    assert all(found)
    return [(int(one[1]), int(one[2])) for one in found if one]


def kept_pack(settings: Settings) -> dict[str, int]:
    """How much there is of the pack of the one tree, which nobody uses."""
    daemon = mounts.list_mounts(settings.run_dir).daemon
    assert daemon is not None
    (tree,) = daemon["trees"]
    assert tree["users"] == 0
    return dict(tree["pack"])


def at_rest(settings: Settings) -> bool:
    """Whether nothing is under way."""
    daemon = mounts.list_mounts(settings.run_dir).daemon
    assert daemon is not None
    links = [link for links in daemon["links"].values() for link in links.values()]
    classes = [one for link in links for one in link["classes"].values()]
    return not any(one["running"] or one["queued_spans"] for one in classes)


def test_a_pack_is_fetched_no_further_while_nobody_has_the_tree(workplace: Path, settings: Settings) -> None:
    """Beyond what was on its way: what is asked for before the index is known, and a request."""
    large = random.Random(2).randbytes(12_500_000)

    def mount_it(name: str) -> None:
        mount(name, workplace / "mnt", replace(settings, most_requests=1), writable=True)

    async def main() -> None:
        apart = settings_in(workplace / "elsewhere")
        layer = busybox_layer(TarItem(b"etc/hello", content=b"hello\n"), TarItem(b"large", content=large))
        await packed(await lazy_image(workplace / "layout", apart, [layer]), apart)
        blobs = blobs_of(workplace / "layout", "packed")
        async with scripted_registry(to_registry(workplace)) as registry:
            held = Hold()
            beyond = registry.faults.add(held, path=blobs["data"], nth=2)
            name = f"{registry.host}/team/app:packed"
            await trio.to_thread.run_sync(mount_it, name)
            await held.arrived.wait()
            await trio.to_thread.run_sync(umount, workplace / "mnt", settings)
            before = (await trio.to_thread.run_sync(kept_pack, settings))["cached"]
            held.release.set()
            await trio.to_thread.run_sync(eventually, lambda: at_rest(settings))
            kept = await trio.to_thread.run_sync(kept_pack, settings)
            assert beyond.seen == 2
            assert before < kept["cached"] < kept["size"]
            shown = invoke("status", env={"VENEER_RUN_DIR": str(settings.run_dir)})
            assert "of its pack" in shown.stdout
            # It goes on where it was, for the next one.
            await trio.to_thread.run_sync(mount_it, name)
            await trio.to_thread.run_sync(eventually, lambda: the_pack(settings).complete)
            got = await trio.to_thread.run_sync((workplace / "mnt/large").read_bytes)
            assert got[2_000_000:] == large[2_000_000:]
            (begin, ahead), *rest = ranges_of(registry, blobs["data"])
            assert begin == 0
            assert rest[0][0] <= ahead + 1
            assert [start for start, _ in rest[1:]] == [end + 1 for _, end in rest[:-1]], "nothing twice"
            await trio.to_thread.run_sync(umount, workplace / "mnt", settings)
            shown = invoke("status", env={"VENEER_RUN_DIR": str(settings.run_dir)})
            assert "kept for another start" in shown.stdout
            assert "of its pack" not in shown.stdout

    trio.run(main)


def test_a_pack_is_asked_for_before_its_index_has_come(workplace: Path, settings: Settings, image: str) -> None:
    async def main() -> None:
        await packed(image, settings_in(workplace / "elsewhere"))
        blobs = blobs_of(workplace / "layout", "packed")
        async with scripted_registry(to_registry(workplace)) as registry:
            registry.faults.add(held := Hold(), path=blobs["index"])
            name = f"{registry.host}/team/app:packed"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, started, name, settings)
                await held.arrived.wait()
                await trio.to_thread.run_sync(eventually, lambda: bool(fetched(registry, blobs["data"])))
                held.release.set()

    trio.run(main)


@pytest.mark.parametrize("blob", ["index", "data"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_pack_that_is_damaged_in_the_registry(
    workplace: Path, settings: Settings, image: str, blob: str, damage: str
) -> None:
    name = trio.run(packed, image, settings_in(workplace / "elsewhere"))
    path = workplace / "layout/blobs/sha256" / blobs_of(workplace / "layout", "packed")[blob][7:]
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    mount(name, workplace / "mnt", settings)
    assert (workplace / "mnt/etc/hello").read_bytes() == b"hello\n"
    assert (workplace / "mnt/large").read_bytes() == LARGE
    found = mounts.list_mounts(settings.run_dir).mounts[0].report
    assert found is not None
    assert (found.pack is None) == (blob == "index")
    assert found.store["errors"] == 0
    umount(workplace / "mnt", settings)


def test_a_pack_of_another_image_is_left_alone(workplace: Path, settings: Settings, image: str) -> None:
    """Of an older version: some layers are the same. Somebody has put it in the place of the right one."""

    async def make() -> Sequence[str]:
        other = workplace / "other"
        base = busybox_layer()
        old = await lazy_image(other, settings_in(other), [base, tar([TarItem(b"v", content=b"1" * 9000)])])
        async with open_image(old, settings_in(other)) as opened:
            await opened.load()
            old_profile = profile_of(opened, (b"bin/busybox", 0, 9_000), (b"v", 0, 9000))
        made = await make_local_pack(old, old_profile, settings)
        new = await lazy_image(other, settings_in(other), [base, tar([TarItem(b"v", content=b"2" * 9000)])])
        async with open_image(new, settings) as opened:
            there = made.directory.parents[1] / opened.manifest.digest.hex / "default"
            there.parent.mkdir(parents=True)
            made.directory.rename(there)
        return new

    new = trio.run(make)
    notices: list[str] = []

    def report(event: Event) -> None:
        assert isinstance(event, Notice)
        notices.append(event.message)

    async def opened() -> bool:
        async with open_image(str(new), settings, pack="default", report=report) as found:
            return found.pack is None

    assert trio.run(opened)
    assert any("stale" in notice for notice in notices)

    async def opened_with_it() -> None:
        """As when a mount is restored that was made with it."""
        async with open_image(str(new), settings) as found:
            named = local_pack(settings.cache_dir, found.manifest.digest, "default")
        async with open_image(str(new), settings, pack=named):
            pass

    with pytest.raises(IntegrityError, match="stale"):
        trio.run(opened_with_it)
    mount(str(new), workplace / "mnt", settings)
    assert (workplace / "mnt/v").read_bytes() == b"2" * 9000
    umount(workplace / "mnt", settings)


def test_a_pack_that_this_host_made(workplace: Path, settings: Settings, image: str) -> None:
    profile = trio.run(start_profile, image, settings)
    made = trio.run(make_local_pack, image, profile, settings)
    mount(image, workplace / "mnt", settings)
    assert the_pack(settings).origin == "local"
    assert the_pack(settings).digest == str(made.pack.descriptor.digest)
    assert (workplace / "mnt/large").read_bytes() == LARGE
    umount(workplace / "mnt", settings)
    # Not for another workload, nor where it is damaged.
    mount(image, workplace / "mnt", settings, workload="other")
    assert mounts.list_mounts(settings.run_dir).mounts[0].report.pack is None  # type: ignore[union-attr]
    umount(workplace / "mnt", settings)
    shutil.rmtree(made.directory)
    mount(image, workplace / "mnt", settings)
    assert (workplace / "mnt/large").read_bytes() == LARGE
    umount(workplace / "mnt", settings)
    with pytest.raises(UsageError):
        mount(image, workplace / "mnt", settings, workload="../x")


@pytest.mark.parametrize("pull", ["always", "missing"])
def test_a_pack_that_is_made_between_two_starts_is_used(
    workplace: Path, settings: Settings, image: str, pull: str
) -> None:
    settings = replace(settings, pull=pull)
    mount(image, workplace / "mnt", settings, writable=True)
    umount(workplace / "mnt", settings)
    profile = trio.run(start_profile, image, settings)
    trio.run(make_local_pack, image, profile, settings)
    mount(image, workplace / "mnt", settings, writable=True)
    assert the_pack(settings).origin == "local", "what is kept is without it"
    umount(workplace / "mnt", settings)


def test_a_worker_killed_in_the_middle_of_a_packed_start(
    workplace: Path, settings: Settings, image: str
) -> None:
    async def main() -> None:
        await packed(image, settings_in(workplace / "elsewhere"))
        data = blobs_of(workplace / "layout", "packed")["data"]
        async with scripted_registry(to_registry(workplace)) as registry:
            held = Hold()
            registry.faults.add(held, path=f"/blobs/{data}")
            name = f"{registry.host}/team/app:packed"
            await trio.to_thread.run_sync(mount, name, workplace / "mnt", settings)
            await held.arrived.wait()
            before = processes(settings)["worker"]
            got: list[bytes] = []

            async def reader() -> None:
                got.append(await trio.to_thread.run_sync(read, workplace / "mnt/large", 2_000_000, 200_000))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader)
                await trio.to_thread.run_sync(kill, settings, "worker")
                await trio.to_thread.run_sync(another_worker, settings, before)
                held.release.set()
            assert got == [LARGE[2_000_000:2_200_000]]
            assert (await trio.to_thread.run_sync(the_pack, settings)).mapped
            whole = await trio.to_thread.run_sync((workplace / "mnt/large").read_bytes)
            assert whole == LARGE
            await trio.to_thread.run_sync(umount, workplace / "mnt", settings)

    trio.run(main)


def test_where_fuse_serves_a_pack_is_a_hint(workplace: Path, settings: Settings, image: str) -> None:
    profile = trio.run(start_profile, image, settings)
    trio.run(make_local_pack, image, profile, settings)
    mount(image, workplace / "mnt", replace(settings, backend="fuse"))
    assert not the_pack(settings).mapped
    assert (workplace / "mnt/large").read_bytes() == LARGE
    umount(workplace / "mnt", settings)


def test_packs_survive_copying_and_are_held_against_the_layers(
    workplace: Path, settings: Settings, image: str
) -> None:
    async def main() -> None:
        name = await packed(image, settings)
        copy = f"oci:{workplace}/copy:x"
        result = await convert(name, copy, settings)
        assert [pack.workload for pack in result.images[0].packs] == ["default"]
        profile = await start_profile(copy, settings, "second")
        result = await convert(copy, copy, settings, profiles=[profile])
        assert [pack.workload for pack in result.images[0].packs] == ["default", "second"]
        async with open_image(copy, settings, pack="second") as opened:
            assert opened.pack is not None
            verdict = await verify_image(opened, cache_dir=settings.cache_dir)
            assert verdict.ok
            assert [pack.workload for pack in verdict.packs] == ["default", "second"]
        stranger = Profile("default", "", (), 1, (Use(Digest.of(b""), 0, 512, 0.0, 0.0),))
        with pytest.raises(UsageError, match="none of the layers"):
            await convert(copy, f"oci:{workplace}/copy:y", settings, profiles=[stranger])

    trio.run(main)


def test_a_pack_that_lies_is_found_out(workplace: Path, settings: Settings, image: str) -> None:
    """Its places say that the bytes of one page are those of another."""

    async def main() -> None:
        made = await make_local_pack(image, await start_profile(image, settings), settings)
        index = decode_pack_index(made.pack.index, made.pack.descriptor)
        last = in_order(index.places)[-1]
        shifted = tuple(
            place._replace(offset=place.offset - 4096) if place == last else place for place in index.places
        )
        forged = encode_pack_index(PackIndex(index.device, shifted))
        async with open_image(image, settings) as opened:
            keep_local_pack(settings.cache_dir, opened.manifest.digest, "default", forged, made.pack.data)
            verdict = await verify_image(opened, cache_dir=settings.cache_dir)
        assert not verdict.ok
        assert verdict.exit_code == IntegrityError.exit_code
        assert "other bytes" in verdict.packs[0].problems[0]

    trio.run(main)
