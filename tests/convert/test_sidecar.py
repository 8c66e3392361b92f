"""Sidecars: images as they are, made lazily loadable from beside; right ones, and those that are not."""

import gzip
import json
import random
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import trio
import zstandard
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.convert.layouts import Layout
from tests.convert.lies import a_lie
from veneer.convert.convert import convert
from veneer.convert.sidecar import IndexedImage, make_sidecar
from veneer.errors import IntegrityError, RegistryError, UnsupportedFormat, UsageError
from veneer.events import Event, Notice
from veneer.image import Image, open_image
from veneer.image.files import read_file
from veneer.image.open import kept_sidecars
from veneer.image.refute import watch_layers
from veneer.index.wire import encode_tree
from veneer.oci.digest import Digest
from veneer.prefetch.profile import Profile, Use
from veneer.settings import Settings
from veneer.store.maintenance import clear
from veneer.store.spanstore import open_store
from veneer.testing.actions import Action, DropHeader, FlipBit, Status
from veneer.testing.images import Layer, random_layers, write_image
from veneer.testing.registry import ScriptedRegistry, scripted_registry
from veneer.testing.tars import TarItem, tar
from veneer.verify import verify_image

pytestmark = pytest.mark.network

RANDOM = random.Random(5)
TEXT = b" ".join(b"%d words" % RANDOM.getrandbits(30) for _ in range(160_000))
BASE = (
    TarItem(b"etc", "dir", mode=0o755),
    TarItem(b"etc/release", content=b"ID=test\n"),
    TarItem(b"noise", content=RANDOM.randbytes(1_500_000)),
    TarItem(b"text", content=TEXT),
    TarItem(b"null", "char", rdev=(1, 3)),
)
TOP = (TarItem(b"etc/more", content=b"more"), TarItem(b"bin", "symlink", link=b"usr/bin"))


@pytest.fixture
def app(tmp_path: Path) -> Layout:
    """What the registry serves as ``app``: images that nobody has converted."""
    layout = Layout(tmp_path / "registry/app")
    for compression in ("gzip", "zstd", "none"):
        write_image([BASE, TOP], layout.path, compression, compression)
    return layout


@pytest.fixture
async def registry(tmp_path: Path, app: Layout) -> AsyncIterator[ScriptedRegistry]:
    async with scripted_registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def elsewhere(settings: Settings, tmp_path: Path) -> Settings:
    """Another host."""
    return replace(settings, cache_dir=tmp_path / "other-cache")


async def content(image: Image, settings: Settings, path: bytes) -> bytes:
    pieces: list[bytes] = []
    async with open_store(settings) as store:
        pieces += [piece async for piece in read_file(image, store, path)]
    return b"".join(pieces)


async def trees(image: Image) -> list[bytes]:
    return [encode_tree(layer.tree) for layer in await image.layer_indexes()]


async def convert_trees(reference: str, settings: Settings, directory: Path, devices: str) -> list[bytes]:
    await convert(reference, f"oci:{directory}/converted:v1", settings, devices=devices)
    async with open_image(f"oci:{directory}/converted:v1", settings) as image:
        return await trees(image)


@given(
    layers=random_layers(),
    compression=st.sampled_from(["gzip", "zstd", "none"]),
    devices=st.sampled_from(["drop", "keep"]),
)
@hypothesis_settings(
    deadline=None,
    max_examples=15,
    phases=[Phase.generate],
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.filter_too_much,
    ],
)
def test_trees_are_those_of_a_converted_image(
    layers: list[Layer],
    compression: str,
    devices: str,
    settings: Settings,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("random")
    host = replace(settings, cache_dir=directory / "cache")
    write_image(layers, directory / "image", "v1", compression)
    reference = f"oci:{directory}/image:v1"

    async def check() -> None:
        made = await make_sidecar(reference, host, push=False, devices=devices)
        async with open_image(reference, host) as image:
            assert image.index_origin == "local"
            assert image.policy.devices == devices
            assert dict(image.policy.dropped) == dict(made.dropped)
            assert (await verify_image(image)).ok
            assert await trees(image) == await convert_trees(reference, host, directory, devices)

    trio.run(check)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
async def test_a_pushed_sidecar_is_found_and_read_by_every_host(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings, compression: str
) -> None:
    reference = f"{registry.host}/app:{compression}"
    before = app.manifest(compression)
    made = await make_sidecar(reference, settings, push=True)
    assert made.artifact is not None
    assert app.manifest(compression) == before
    assert (await make_sidecar(reference, settings, push=True)).artifact == made.artifact
    del registry.requests[:]
    async with open_image(reference, elsewhere) as image:
        # Manifest, referrers and at the same time config, the artifact, index.
        kinds = [record.path.split("/")[-2] for record in registry.requests]
        assert sorted(kinds) == ["blobs", "blobs", "manifests", "manifests", "referrers"]
        assert image.index_origin == "referrer"
        assert await content(image, elsewhere, b"etc/release") == b"ID=test\n"
        stored = sum(layer["size"] for layer in before["layers"])
        fetched = sum(record.bytes_sent for record in registry.asked("GET", "/blobs/"))
        if compression != "zstd":  # one frame, which cannot be entered
            assert fetched < stored / 2
        assert await content(image, elsewhere, b"text") == TEXT


async def test_a_sidecar_of_this_host_needs_no_request(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    reference = f"{registry.host}/app:gzip"
    made = await make_sidecar(reference, settings, push=False)
    assert made.artifact is None
    del registry.requests[:]
    async with open_image(reference, settings) as image:
        assert image.index_origin == "local"
        assert [record.path for record in registry.requests] == ["/v2/app/manifests/gzip"]
        assert await content(image, settings, b"text") == TEXT
    layers = {layer["digest"] for layer in app.manifest("gzip")["layers"]}
    assert {record.path.rpartition("/")[2] for record in registry.requests[1:]} == layers - {
        app.manifest("gzip")["layers"][1]["digest"]
    }
    for path in (settings.cache_dir / "sidecars/blobs").glob("*/*"):
        if path.name != made.index.digest.hex:
            path.unlink()  # its windows, without which nothing could be read
    with pytest.raises(UnsupportedFormat, match="veneer"):
        async with open_image(reference, settings):
            pass


async def test_a_damaged_sidecar_of_this_host_is_an_error(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    reference = f"{registry.host}/app:gzip"
    made = await make_sidecar(reference, settings, push=False)
    index = settings.cache_dir / "sidecars/blobs/sha256" / made.index.digest.hex
    data = index.read_bytes()
    for offset in (0, 60, 200, len(data) - 1):
        index.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        with pytest.raises(IntegrityError, match="expected sha256"):
            async with open_image(reference, settings):
                pass
    # What is not whole is not there.
    (note,) = (settings.cache_dir / "sidecars").glob("sha256-*")
    whole = {index: data, note: note.read_bytes()}
    for path in whole:
        path.write_bytes(whole[path][:-1])
        with pytest.raises(UnsupportedFormat, match="has no index"):
            async with open_image(reference, settings):
                pass
        path.write_bytes(whole[path])
    async with open_image(reference, settings) as image:
        assert image.index_origin == "local"


async def test_what_was_found_is_remembered_and_can_be_refused(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings
) -> None:
    reference = f"{registry.host}/app:gzip"
    await make_sidecar(reference, settings, push=True)
    async with open_image(reference, elsewhere):
        pass
    del registry.requests[:]
    async with open_image(reference, elsewhere) as image:
        assert image.index_origin == "referrer"
    assert [record.path for record in registry.requests] == ["/v2/app/manifests/gzip"]
    with pytest.raises(UnsupportedFormat, match="no referrers"):
        async with open_image(reference, replace(elsewhere, referrers="ignore")):
            pass
    assert not registry.asked("GET", "/referrers/")


async def test_an_old_memory_is_refreshed_and_used_when_that_fails(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings
) -> None:
    reference = f"{registry.host}/app:gzip"
    await make_sidecar(reference, settings, push=True)
    async with open_image(reference, elsewhere) as image:
        digest = image.manifest.digest
    kept = kept_sidecars(elsewhere)
    known = kept.find(digest)
    assert known is not None
    kept.keep(digest, replace(known, seen_s=0))
    del registry.requests[:]
    registry.faults.add(Status(503), method="GET", path="/referrers/", count=None)
    async with open_image(reference, elsewhere) as image:
        assert image.index_origin == "referrer"
    assert registry.asked("GET", "/referrers/")
    registry.faults.clear()
    registry.faults.add(Status(403), method="GET", path="/referrers/", count=None)
    with pytest.raises(RegistryError, match="403"):
        async with open_image(reference, elsewhere):
            pass


@pytest.mark.parametrize("seen_s", [0, 1 << 40], ids=["long ago", "by a clock that was put back since"])
async def test_an_old_memory_gives_way_to_what_is_there_now(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings, seen_s: int
) -> None:
    reference = f"{registry.host}/app:gzip"
    await make_sidecar(reference, settings, push=True)
    async with open_image(reference, elsewhere) as image:
        digest = image.manifest.digest
    await make_sidecar(reference, settings, push=True, profiles=[profile_of(app, "gzip")])
    async with open_image(reference, elsewhere, pack="default") as image:
        assert image.pack is None, "nobody has looked since"
    kept = kept_sidecars(elsewhere)
    known = kept.find(digest)
    assert known is not None
    kept.keep(digest, replace(known, seen_s=seen_s))
    async with open_image(reference, elsewhere, pack="default") as image:
        assert image.pack is not None


async def test_a_memory_that_cannot_be_written_costs_only_itself(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings
) -> None:
    reference = f"{registry.host}/app:gzip"
    await make_sidecar(reference, settings, push=True)
    elsewhere.cache_dir.mkdir()
    (elsewhere.cache_dir / "sidecars").write_text("in the way")
    async with open_image(reference, elsewhere) as image:
        assert image.index_origin == "referrer"


async def test_a_registry_without_referrers_keeps_them_under_a_tag(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings
) -> None:
    registry.faults.add(Status(404), path="/referrers/", count=None)
    registry.faults.add(DropHeader("OCI-Subject"), method="PUT", path="/manifests/", count=None)
    reference = f"{registry.host}/app:gzip"
    made = await make_sidecar(reference, settings, push=True)
    async with open_image(reference, elsewhere) as image:
        assert image.index_origin == "referrer"
        assert image.index_descriptor == made.index


async def test_a_sidecar_is_for_the_manifest_that_it_names(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings
) -> None:
    """Whatever list it is in: even where all layers are the same."""
    made = await make_sidecar(f"{registry.host}/app:gzip", settings, push=True)
    app.change("gzip", "other", annotations={"some": "difference"})
    artifact = app.file(str(made.artifact)).read_bytes()
    entry = app.store("application/vnd.oci.image.manifest.v1+json", artifact)
    kind = "application/vnd.oci.image.index.v1+json"
    listed = app.store(kind, json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": [entry]}).encode())
    registry.faults.add(Status(404), path="/referrers/", count=None)
    for tag in ("gzip", "other"):
        app.tag(app.tags()[tag]["digest"].replace(":", "-"), listed)
    async with open_image(f"{registry.host}/app:gzip", elsewhere) as image:
        assert image.index_origin == "referrer"
    with pytest.raises(UnsupportedFormat, match="has no index"):
        async with open_image(f"{registry.host}/app:other", elsewhere):
            pass


def add_artifact(app: Layout, document: dict[str, object]) -> str:
    """Have the registry list one more; its digest."""
    entry = app.store(str(document["mediaType"]), json.dumps(document).encode())
    index = json.loads((app.path / "index.json").read_text())
    index["manifests"].append(entry)
    (app.path / "index.json").write_text(json.dumps(index))
    return str(entry["digest"])


async def stale(registry: ScriptedRegistry, app: Layout, settings: Settings) -> IndexedImage:
    """A sidecar of ``zstd``, made to refer to ``gzip`` as well."""
    made = await make_sidecar(f"{registry.host}/app:zstd", settings, push=True)
    subject = {key: app.tags()["gzip"][key] for key in ("mediaType", "digest", "size")}
    add_artifact(app, {**app.document(str(made.artifact)), "subject": subject})
    return made


async def test_a_sidecar_of_other_layers_is_not_used(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings
) -> None:
    await stale(registry, app, settings)
    reference = f"{registry.host}/app:gzip"
    events: list[Event] = []
    with pytest.raises(UnsupportedFormat, match="has no index"):
        async with open_image(reference, elsewhere, report=events.append):
            pass
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert any("is not used" in notice and "the image has" in notice for notice in notices)
    async with open_store(elsewhere) as store, open_image(reference, elsewhere, keeper=store) as image:
        assert image.index_origin == "streamed"
    # It is not remembered.
    digest = Digest.parse(app.tags()["gzip"]["digest"])
    assert kept_sidecars(elsewhere).find(digest) is None


@pytest.mark.parametrize("offset", [0, 200, -1])
async def test_a_damaged_index_is_not_used(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings, offset: int
) -> None:
    reference = f"{registry.host}/app:gzip"
    made = await make_sidecar(reference, settings, push=True)
    app.flip(str(made.index.digest), offset)
    events: list[Event] = []
    with pytest.raises(UnsupportedFormat, match="has no index"):
        async with open_image(reference, elsewhere, report=events.append):
            pass
    assert any("is not used" in event.message for event in events if isinstance(event, Notice))


@pytest.mark.parametrize("what", ["damaged", "missing", "of another kind", "of two indexes"])
async def test_an_artifact_that_is_no_good_is_left_out(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings, what: str
) -> None:
    """Whoever may push can add one: it must not make an image worse than it is without."""
    reference = f"{registry.host}/app:gzip"
    made = await make_sidecar(reference, settings, push=True, profiles=[profile_of(app, "gzip")])
    artifact = app.document(str(made.artifact))
    bad = str(made.artifact)
    if what == "of another kind":
        kind = "application/vnd.oci.image.index.v1+json"
        listed = {**artifact, "mediaType": kind, "manifests": []}
        bad = add_artifact(app, {key: listed[key] for key in listed if key not in ("config", "layers")})
    elif what == "of two indexes":
        wrong = app.store(artifact["layers"][0]["mediaType"], b"no index")
        bad = add_artifact(app, {**artifact, "layers": [wrong, *artifact["layers"] * 2]})
    faults: dict[str, Action] = {"damaged": FlipBit(20), "missing": Status(404)}
    fault = faults.get(what)
    if fault is not None:
        registry.faults.add(fault, method="GET", path=f"/manifests/{bad}", count=None)
        with pytest.raises(UnsupportedFormat, match="has no index"):
            async with open_image(reference, elsewhere):
                pass
    assert registry.asked("GET", f"/manifests/{bad}") or fault is None
    right = await make_sidecar(reference, settings, push=True)
    async with open_image(reference, elsewhere) as image:
        assert registry.asked("GET", f"/manifests/{bad}")
        assert image.index_origin == "referrer"
        assert image.index_descriptor == right.index


async def test_of_very_many_artifacts_only_some_are_looked_at(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings
) -> None:
    reference = f"{registry.host}/app:gzip"
    made = await make_sidecar(reference, settings, push=True)
    artifact = app.document(str(made.artifact))
    for number in range(20):
        add_artifact(app, {**artifact, "annotations": {"number": str(number)}})
    del registry.requests[:]
    async with open_image(reference, elsewhere) as image:
        assert image.index_origin == "referrer"
    assert len(registry.asked("GET", "/manifests/sha256:")) <= 8


async def test_damaged_windows_are_an_error_never_wrong_bytes(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings
) -> None:
    reference = f"{registry.host}/app:gzip"
    made = await make_sidecar(reference, settings, push=True)
    artifact = app.document(str(made.artifact))
    windows = max(
        (blob for blob in artifact["layers"] if "windows" in blob["mediaType"]), key=lambda blob: blob["size"]
    )
    app.flip(windows["digest"], windows["size"] // 2)
    async with open_image(reference, elsewhere) as image:
        with pytest.raises(IntegrityError, match="expected sha256"):
            await content(image, elsewhere, b"text")
        app.flip(windows["digest"], windows["size"] // 2)
        assert await content(image, elsewhere, b"text") == TEXT
        assert (await verify_image(image)).ok


async def refute(reference: str, settings: Settings, how: str) -> None:
    """Have the lie found out."""
    async with open_store(settings) as store, open_image(reference, settings) as image:
        if how == "verify":
            assert not (await verify_image(image, cache_dir=settings.cache_dir)).ok
            return
        attached = [store.attach(*pair) for pair in zip(image.devices, image.sources, strict=True)]
        watch_layers(image, attached, settings.cache_dir)
        await store.read(attached[0], 0, attached[0].size)
        with pytest.raises(IntegrityError, match="contents of layer"):
            await store.prove(attached[0])


@pytest.mark.parametrize("how", ["mount", "verify"])
async def test_a_sidecar_that_was_refuted_is_not_used_again(
    registry: ScriptedRegistry,
    app: Layout,
    settings: Settings,
    elsewhere: Settings,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    reference = f"{registry.host}/app:gzip"
    lie = await a_lie(reference, settings, monkeypatch, profile_of(app, "gzip"))
    await refute(reference, elsewhere, how)
    told: list[Event] = []
    async with (
        open_store(elsewhere) as store,
        open_image(reference, elsewhere, keeper=store, report=told.append) as image,
    ):
        assert image.index_origin == "streamed"
        assert b"".join([piece async for piece in read_file(image, store, b"text")]) == TEXT
    notices = [one.message for one in told if isinstance(one, Notice)]
    (why,) = (notice for notice in notices if f"index {lie.index.digest} was refuted" in notice)
    assert "veneer index --push" in why, "what to do"
    with pytest.raises(UnsupportedFormat, match="has no index"):
        async with open_image(reference, replace(elsewhere, cache_dir=copy_of_notes(elsewhere))):
            pass
    # A right one counts, though the wrong one has a pack besides.
    shutil.rmtree(elsewhere.cache_dir / "layers")
    right = await make_sidecar(reference, settings, push=True)
    async with open_image(reference, elsewhere) as image:
        assert image.index_origin == "referrer"
        assert image.index_descriptor is not None
        assert image.index_descriptor.digest == right.index.digest
        assert await content(image, elsewhere, b"text") == TEXT
    clear(elsewhere.cache_dir)
    kept_sidecars(elsewhere).forget(image.manifest.digest)
    async with open_image(reference, elsewhere) as image:
        assert image.index_descriptor is not None
        assert image.index_descriptor.digest == lie.index.digest, "what was refuted is forgotten"


async def test_a_right_sidecar_is_looked_for_as_soon_as_the_known_one_was_refuted(
    registry: ScriptedRegistry,
    app: Layout,
    settings: Settings,
    elsewhere: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = f"{registry.host}/app:gzip"
    lie = await a_lie(reference, settings, monkeypatch)
    async with open_image(reference, elsewhere) as image:
        assert image.index_descriptor == lie.index
    right = await make_sidecar(reference, settings, push=True)
    await refute(reference, elsewhere, "mount")
    async with open_image(reference, elsewhere) as image:
        assert image.index_descriptor == right.index
        assert await content(image, elsewhere, b"text") == TEXT


def copy_of_notes(settings: Settings) -> Path:
    """Another cache directory, with nothing but the notes of what was refuted."""
    other = settings.cache_dir.with_name("notes")
    shutil.copytree(settings.cache_dir / "refuted", other / "refuted")
    return other


async def test_a_sidecar_that_lies_is_found_out_once_a_layer_is_whole_and_can_be_refused(
    registry: ScriptedRegistry,
    app: Layout,
    settings: Settings,
    elsewhere: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever may push can make one: here with windows that are not what lies before their spans."""
    reference = f"{registry.host}/app:gzip"
    await a_lie(reference, settings, monkeypatch)
    async with open_store(elsewhere) as store, open_image(reference, elsewhere) as image:
        assert image.index_origin == "referrer"
        shown = b"".join([piece async for piece in read_file(image, store, b"text")])
        # Until then nothing can tell: every span is what the index says.
        assert len(shown) == len(TEXT)
        assert shown != TEXT
        attached = store.attach(image.devices[0], image.sources[0])
        assert await store.fetch_rest(attached)
        with pytest.raises(IntegrityError, match="contents of layer"):
            await store.prove(attached)
        assert not attached.complete
        assert attached.file is not None
        assert not list(attached.file.held()), "nothing of it stays in the cache"
        with pytest.raises(IntegrityError, match="contents of layer"):
            await store.read(attached, 0, 1000)
        assert not (await verify_image(image)).ok
    careful = replace(elsewhere, referrers="ignore")
    async with open_store(careful) as store, open_image(reference, careful, keeper=store) as image:
        assert image.index_origin == "streamed"
        assert b"".join([piece async for piece in read_file(image, store, b"text")]) == TEXT


def profile_of(app: Layout, tag: str) -> Profile:
    config = app.document(app.manifest(tag)["config"]["digest"])
    layer = Digest.parse(config["rootfs"]["diff_ids"][0])
    return Profile("default", "", ("true",), 1, (Use(layer, 1 << 20, 1 << 20, 1.0, 0.0),))


async def test_packs_come_with_the_sidecar(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings
) -> None:
    reference = f"{registry.host}/app:gzip"
    bare = app.document(str((await make_sidecar(reference, settings, push=True)).artifact))
    made = await make_sidecar(reference, settings, push=True, profiles=[profile_of(app, "gzip")])
    assert [pack.workload for pack in made.packs] == ["default"]
    assert made.artifact is not None
    # Lists are in the order of digests: here is one that comes before it.
    others = ({**bare, "annotations": {"number": str(number)}} for number in count())
    add_artifact(
        app, next(one for one in others if Digest.of(json.dumps(one).encode()).hex < made.artifact.hex)
    )
    del registry.requests[:]
    async with open_image(reference, elsewhere, pack="default") as image:
        assert image.pack is not None
        assert (image.pack.named.workload, image.pack.named.origin) == ("default", "referrer")
        # The better of three artifacts: list, all of them, then index, config and pack index.
        assert len(registry.requests) == 1 + 1 + 3 + 3
        assert (await verify_image(image, cache_dir=elsewhere.cache_dir)).ok
    async with open_image(reference, settings, pack="default") as image:
        assert image.pack is not None


async def test_a_pack_does_not_outlive_the_index_that_it_came_with(
    registry: ScriptedRegistry, app: Layout, settings: Settings, elsewhere: Settings
) -> None:
    reference = f"{registry.host}/app:gzip"
    made = await make_sidecar(reference, settings, push=True, profiles=[profile_of(app, "gzip")])
    app.flip(str(made.index.digest), 200)
    events: list[Event] = []
    async with (
        open_store(elsewhere) as store,
        open_image(reference, elsewhere, pack="default", keeper=store, report=events.append) as image,
    ):
        assert image.index_origin == "streamed"
        assert image.pack is None
    assert any("pack" in event.message for event in events if isinstance(event, Notice))


async def test_profiles_of_other_images_and_images_with_an_index_are_refused(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    other = Profile("default", "", ("true",), 1, (Use(Digest.of(b"other"), 0, 4096, 1.0, 0.0),))
    with pytest.raises(UsageError, match="none of the layers"):
        await make_sidecar(f"{registry.host}/app:gzip", settings, push=True, profiles=[other])
    await convert(f"{registry.host}/app:gzip", f"{registry.host}/app:native", settings)
    with pytest.raises(UsageError, match="names an index already"):
        await make_sidecar(f"{registry.host}/app:native", settings, push=True)


async def test_layers_that_arrive_damaged_or_are_wrong_are_refused(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    layer = app.manifest("gzip")["layers"][0]
    registry.faults.add(FlipBit(1000), method="GET", path=layer["digest"], count=None)
    with pytest.raises(IntegrityError, match="expected sha256"):
        await make_sidecar(f"{registry.host}/app:gzip", settings, push=False)
    config = app.document(app.manifest("none")["config"]["digest"])
    config["rootfs"]["diff_ids"][1] = str(Digest.of(b"other"))
    app.change(
        "none",
        "wrong",
        config=app.store("application/vnd.oci.image.config.v1+json", json.dumps(config).encode()),
    )
    with pytest.raises(IntegrityError, match="diffID"):
        await make_sidecar(f"{registry.host}/app:wrong", settings, push=False)
    assert not list(settings.cache_dir.glob("convert/index-*"))


async def test_a_registry_that_refuses_the_artifact_is_an_error(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    registry.faults.add(Status(400), method="PUT", path="/manifests/", count=None)
    with pytest.raises(RegistryError) as caught:
        await make_sidecar(f"{registry.host}/app:gzip", settings, push=True)
    assert "without --push" in (caught.value.hint or "")


async def test_existing_frames_of_zstd_layers_are_spans_and_a_large_one_is_told(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    plain = tar([TarItem(b"a", content=TEXT), TarItem(b"b", content=bytes(20 << 20))])
    pieces = [plain[start : start + 300_000] for start in range(0, 3_000_000, 300_000)] + [plain[3_000_000:]]
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    unsized = zstandard.ZstdCompressor(write_content_size=False)
    stored = skippable.join(unsized.compress(piece) for piece in pieces) + skippable
    layer = app.store("application/vnd.oci.image.layer.v1.tar+zstd", stored)
    config = app.document(app.manifest("zstd")["config"]["digest"])
    config["rootfs"]["diff_ids"] = [str(Digest.of(plain))]
    config_type = "application/vnd.oci.image.config.v1+json"
    app.change("zstd", "frames", layers=[layer], config=app.store(config_type, json.dumps(config).encode()))
    events: list[Event] = []
    made = await make_sidecar(f"{registry.host}/app:frames", settings, push=False, report=events.append)
    assert made.layers[0][2] == len(pieces)
    assert any("veneer convert" in event.message for event in events if isinstance(event, Notice))
    async with open_image(f"{registry.host}/app:frames", settings) as image:
        assert await content(image, settings, b"a") == TEXT
        assert (await verify_image(image)).ok


async def test_layers_of_many_gzip_members_are_entered(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    plain = tar([TarItem(b"a", content=TEXT), TarItem(b"b", content=b"last")])
    stored = b"".join(gzip.compress(plain[start : start + 50_000]) for start in range(0, len(plain), 50_000))
    layer = app.store("application/vnd.oci.image.layer.v1.tar+gzip", stored + gzip.compress(b""))
    config = app.document(app.manifest("gzip")["config"]["digest"])
    config["rootfs"]["diff_ids"] = [str(Digest.of(plain))]
    config_type = "application/vnd.oci.image.config.v1+json"
    app.change("gzip", "members", layers=[layer], config=app.store(config_type, json.dumps(config).encode()))
    made = await make_sidecar(f"{registry.host}/app:members", settings, push=False)
    assert made.layers[0][2] > 1
    async with open_image(f"{registry.host}/app:members", settings) as image:
        assert await content(image, settings, b"b") == b"last"
        assert await content(image, settings, b"a") == TEXT
