"""Starts of images without a pack: what is known of their layers, or attached to them, is fetched first."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.cli.invoking import invoke
from tests.convert.layouts import Layout
from tests.daemon.layouts import LARGE, busybox_layer, lazy_image
from tests.daemon.test_daemon import mount, to_registry, umount
from tests.daemon.test_packs import fetched, profile_of
from tests.waiting import eventually
from veneer.convert.attach import attach_profiles
from veneer.convert.local import make_local_pack
from veneer.daemon import mounts
from veneer.daemon.report import MountReport
from veneer.image import open_image
from veneer.image.hints import attached_profiles, known_hint
from veneer.image.open import resolve_image
from veneer.image.profiles import keep_profile
from veneer.oci.digest import Digest
from veneer.prefetch.profile import Profile, Use
from veneer.settings import Settings
from veneer.testing.registry import ScriptedRegistry, scripted_registry
from veneer.testing.tars import TarItem, tar

pytestmark = [pytest.mark.root]

BASE = busybox_layer(TarItem(b"large", content=LARGE))
#: A part of the large file, which lies in the layer that both images have.
HOT = (b"large", 2_000_000, 1_000_000)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The backend that maps files to packs."""
    return replace(settings, backend="erofs-fanotify")


async def made(directory: Path, settings: Settings, text: bytes, base: bytes = BASE) -> str:
    """An image of the base and a layer of its own."""
    return await lazy_image(directory, settings, [base, tar([TarItem(b"app", content=text)])], {"Cmd": ["sh"]})


async def profiled(
    image: str, settings: Settings, *ranges: tuple[bytes, int, int], **changes: object
) -> Profile:
    async with open_image(image, settings) as opened:
        await opened.load()
        found = profile_of(opened, *(ranges or (HOT,)))
        return replace(found, image=str(opened.manifest.digest), **changes)  # type: ignore[arg-type] # its fields


def report(settings: Settings) -> MountReport:
    (found,) = mounts.list_mounts(settings.run_dir).mounts
    assert found.report is not None
    return found.report


def arrived(settings: Settings) -> bool:
    """Whether what the hint names is in the cache, though nobody has read it."""
    found = report(settings)
    return found.hint is not None and found.layers[0].cached >= HOT[2]


def right(workplace: Path, text: bytes) -> None:
    """Whatever was hinted at, every byte is what it should be."""
    assert (workplace / "mnt/large").read_bytes() == LARGE
    assert (workplace / "mnt/app").read_bytes() == text


def asked(registry: ScriptedRegistry) -> int:
    return sum("/referrers/" in record.path for record in registry.requests)


def test_a_profile_of_another_image_with_the_same_layers_is_used(workplace: Path, settings: Settings) -> None:
    one = trio.run(made, workplace / "one", settings, b"one")
    two = trio.run(made, workplace / "two", settings, b"two")
    profile = trio.run(profiled, one, settings)
    keep_profile(settings.cache_dir, Digest.parse(profile.image), profile)
    mount(two, workplace / "mnt", settings)
    eventually(lambda: arrived(settings))
    hint = report(settings).hint
    assert hint is not None
    assert (hint.origin, hint.images, hint.layers, hint.size) == ("host", (profile.image,), 1, HOT[2])
    assert report(settings).layers[0].cached < 2 * HOT[2]
    env = {"VENEER_RUN_DIR": str(settings.run_dir), "VENEER_CACHE_DIR": str(settings.cache_dir)}
    shown = invoke("status", env=env)
    assert f"profile of the workload default, of {profile.image[:19]}" in shown.stdout
    assert "1 of 2 layers" in shown.stdout
    right(workplace, b"two")
    umount(workplace / "mnt", settings)
    mount(two, workplace / "mnt", settings, workload="other")
    assert report(settings).hint is None
    umount(workplace / "mnt", settings)


@pytest.mark.network
def test_a_pack_made_for_another_image_is_used_if_all_its_layers_are_here(
    workplace: Path, settings: Settings
) -> None:
    elsewhere = replace(settings, cache_dir=workplace / "elsewhere")
    one = trio.run(made, workplace / "one", elsewhere, b"one")
    trio.run(made, workplace / "layout", elsewhere, b"two")
    profile = trio.run(profiled, one, elsewhere)
    trio.run(make_local_pack, one, profile, settings)
    layer = Layout(workplace / "layout").manifest("lazy")["layers"][0]["digest"]

    async def main() -> None:
        async with scripted_registry(to_registry(workplace)) as registry:
            name = f"{registry.host}/team/app:lazy"
            await trio.to_thread.run_sync(mount, name, workplace / "mnt", settings)
            pack = report(settings).pack
            assert pack is not None
            assert (pack.origin, pack.image, pack.mapped) == ("local", profile.image, True)
            before = len(fetched(registry, layer))
            with (workplace / "mnt/large").open("rb", buffering=0) as file:
                file.seek(HOT[1])
                part = await trio.to_thread.run_sync(file.read, 500_000)
            assert part == LARGE[HOT[1] : HOT[1] + 500_000]
            assert len(fetched(registry, layer)) == before
            await trio.to_thread.run_sync(right, workplace, b"two")
            await trio.to_thread.run_sync(umount, workplace / "mnt", settings)

    trio.run(main)
    # It has bytes of a layer that a third one does not have.
    both = trio.run(profiled, one, settings, (b"app", 0, 3), HOT)
    trio.run(make_local_pack, one, both, settings)
    three = trio.run(made, workplace / "three", settings, b"three")
    mount(three, workplace / "mnt", settings)
    assert report(settings).pack is None
    right(workplace, b"three")
    umount(workplace / "mnt", settings)


@pytest.mark.network
def test_an_attached_profile_is_found_once_and_used(workplace: Path, settings: Settings) -> None:
    image = trio.run(made, workplace / "layout", settings, b"app")
    other = trio.run(made, workplace / "other", settings, b"other")

    async def attach(image: str, *profiles: Profile) -> None:
        await attach_profiles(image, profiles, replace(settings, cache_dir=workplace / "elsewhere"))

    trio.run(attach, image, trio.run(profiled, image, settings, (b"large", 0, 4096)))
    worker = replace(trio.run(profiled, image, settings, (b"app", 0, 3)), workload="worker")
    trio.run(attach, image, trio.run(profiled, image, settings), worker)

    async def main() -> None:
        async with scripted_registry(to_registry(workplace)) as registry:
            name = f"{registry.host}/team/app:lazy"
            await trio.to_thread.run_sync(mount, name, workplace / "mnt", settings)
            await trio.to_thread.run_sync(eventually, lambda: arrived(settings))
            hint = report(settings).hint
            assert hint is not None
            assert (hint.origin, hint.size) == ("attached", HOT[2]), "the later one"
            assert asked(registry) == 1
            await trio.to_thread.run_sync(right, workplace, b"app")
            await trio.to_thread.run_sync(umount, workplace / "mnt", settings)
            for workload, size in (("default", HOT[2]), ("worker", 3), ("none", None)):
                again = lambda workload=workload: mount(name, workplace / "mnt", settings, workload=workload)  # noqa: E731
                await trio.to_thread.run_sync(again)
                if size is not None:
                    await trio.to_thread.run_sync(eventually, lambda: report(settings).hint is not None)
                    found = report(settings).hint
                    assert found is not None
                    assert found.size == size
                await trio.to_thread.run_sync(umount, workplace / "mnt", settings)
            assert asked(registry) == 1, "the answer is kept"

    trio.run(main)
    # That there is none is kept, too.
    note = settings.cache_dir / "profiles/attached"
    before = set(note.iterdir())
    mount(other, workplace / "mnt", settings)
    eventually(lambda: len(set(note.iterdir()) - before) == 1)
    (new,) = set(note.iterdir()) - before
    assert json.loads(new.read_bytes())["profiles"] == []
    umount(workplace / "mnt", settings)


def test_what_is_attached_by_the_command(workplace: Path, settings: Settings) -> None:
    image = trio.run(made, workplace / "one", settings, b"one")
    profile = trio.run(profiled, image, settings)
    path = workplace / "profile.json"
    path.write_bytes(profile.to_json())
    env = {"VENEER_CACHE_DIR": str(settings.cache_dir)}
    done = invoke("profile", "attach", image, str(path), "--json", env=env)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["workloads"] == ["default"]
    twice = invoke("profile", "attach", image, str(path), str(path), env=env)
    assert twice.exit_code == 2
    assert "merge" in twice.stderr
    assert invoke("profile", "attach", image, env=env).exit_code == 11, "none is kept here"
    for kept in (profile, replace(profile, workload="worker")):
        keep_profile(settings.cache_dir, Digest.parse(profile.image), kept)
    done = invoke("profile", "attach", image, "--json", env=env)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["workloads"] == ["default", "worker"]
    assert trio.run(attached_workloads, image, settings) == {"default", "worker"}, "the answer of before is old"
    path.write_bytes(replace(profile, uses=(Use(Digest.of(b"x"), 0, 1, 0.0, 0.0),)).to_json())
    assert invoke("profile", "attach", image, str(path), env=env).exit_code == 2


async def attached_workloads(image: str, settings: Settings) -> set[str]:
    """Those whose profiles this host believes to be attached."""
    async with resolve_image(image, settings) as (resolved, _):
        found = await attached_profiles(resolved.contents, resolved.manifest, settings.cache_dir)
    return {one.annotations["dev.veneer.workload"] for one in found}


@pytest.mark.parametrize("what", ["stale", "wrong", "corrupt"])
@pytest.mark.parametrize("where", ["host", "attached"])
def test_a_hint_that_is_no_good_costs_time_only(
    workplace: Path, settings: Settings, what: str, where: str
) -> None:
    """Stale: of other layers. Wrong: ranges that are needless, or not there. Corrupt: no profile at all."""
    image = trio.run(made, workplace / "one", settings, b"app")
    profile = trio.run(profiled, image, settings)
    (layer,) = profile.layers
    if what == "stale":
        more = (Use(Digest.of(b"gone"), 0, 4096, 0.0, 0.0),)
        bad = replace(profile, uses=more if where == "host" else (*more, *profile.uses))
    else:
        nowhere = (Use(layer, 1 << 40, 1 << 30, 0.0, 0.0), Use(layer, 0, 100, 0.0, 0.0))
        bad = replace(profile, uses=(*nowhere, Use(layer, 4_999_000, 1 << 20, 0.0, 0.0)))
    if where == "host":
        path = keep_profile(settings.cache_dir, Digest.parse(profile.image), bad)
        if what == "corrupt":
            path.write_bytes(path.read_bytes()[:-5])
            for note in (settings.cache_dir / "profiles/layers").glob("*/*"):
                note.write_bytes(b"sha256:nonsense\n\xff\xfe\n" + note.read_bytes())
    else:
        trio.run(_attach, image, [bad], replace(settings, cache_dir=workplace / "elsewhere"))
        if what == "corrupt":
            for blob in (workplace / "one/blobs/sha256").iterdir():
                if b"vnd.veneer.profile" in blob.read_bytes() and b'"uses"' in blob.read_bytes():
                    blob.write_bytes(blob.read_bytes().replace(b'"uses"', b'"used"'))
    mount(image, workplace / "mnt", settings)
    useless = what == "corrupt" or (what, where) == ("stale", "host")
    if not useless:
        eventually(lambda: report(settings).hint is not None)
    right(workplace, b"app")
    assert report(settings).store["errors"] == 0
    assert (report(settings).hint is None) == useless
    umount(workplace / "mnt", settings)


async def _attach(image: str, profiles: Sequence[Profile], settings: Settings) -> None:
    await attach_profiles(image, profiles, settings)


def test_what_is_known_of_layers_is_put_together(tmp_path: Path) -> None:
    one, two, three = (Digest.of(name) for name in (b"1", b"2", b"3"))

    def keep(
        name: bytes, *layers: Digest, command: tuple[str, ...] = (), runs: int = 1, length: int = 10
    ) -> str:
        uses = tuple(Use(layer, 0, length, 0.0, 0.0) for layer in layers)
        image = Digest.of(name)
        keep_profile(tmp_path, image, Profile("default", str(image), command, runs, uses))
        return str(image)

    large = keep(b"large", one, length=1000)
    static = keep(b"static", one, two, runs=0, length=5000)
    same = keep(b"same", one, command=("app",))
    assert known_hint(tmp_path, [three], "default") is None
    assert known_hint(tmp_path, [one], "other") is None
    hint = known_hint(tmp_path, [one, two, three], "default", ("app",))
    assert hint is not None
    assert hint.images == (same, static), "the same command first, and of the others what that does not know"
    assert [(use.layer, use.length) for use in hint.profile.uses] == [(one, 10), (two, 5000)]
    hint = known_hint(tmp_path, [one], "default", ("else",))
    assert hint is not None
    assert hint.images == (large,), "rather the largest that was recorded"
