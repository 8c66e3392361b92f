"""Opening images: as few requests as the data allow, and nothing believed that is not bound to the manifest."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.convert.layouts import Layout
from veneer.convert.convert import convert
from veneer.errors import IntegrityError, NotFound, UnsupportedFormat
from veneer.events import Event, Notice
from veneer.image import open_image
from veneer.image.inspect import inspect_image
from veneer.oci.descriptor import Platform
from veneer.settings import Settings
from veneer.testing.actions import FlipBit, Hold
from veneer.testing.images import write_image
from veneer.testing.registry import ScriptedRegistry
from veneer.testing.tars import TarItem
from veneer.testing.trees import node_at

pytestmark = pytest.mark.network

INDEX_KEY = "dev.veneer.index"


@pytest.fixture
def app(tmp_path: Path) -> Layout:
    """What the registry serves as ``app``."""
    return Layout(tmp_path / "registry/app")


async def test_a_cold_start_is_three_requests_a_known_tag_one_a_known_digest_none(
    registry: ScriptedRegistry, settings: Settings
) -> None:
    reference = f"{registry.host}/app:v1"
    counts = []
    async with open_image(reference, settings) as image:
        assert image.index_origin == "annotation"
        assert image.transport_stats.bytes_received > 0
        pinned = f"{registry.host}/app@{image.manifest.digest}"
        names = {path for path, _ in image.index.walk()}
        assert {b"big", b"etc/os-release", b"release"} <= names
        assert [device.blob.digest for device in image.index.devices] == [
            layer.digest for layer in image.manifest.layers
        ]
        assert [source.size for source in image.sources] == [layer.size for layer in image.manifest.layers]
        assert image.config.cmd == ("/bin/tool",)
        assert all(note.lazy and note.codecs == ("zstd",) and note.index_size > 0 for note in image.layers)
    counts.append(len(registry.requests))
    for again in (reference, pinned):
        async with open_image(again, settings):
            pass
        counts.append(len(registry.requests))
    assert counts == [3, 4, 4]


async def test_config_and_index_are_asked_for_at_once(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    manifest = app.manifest("v1")
    index = json.loads(manifest["annotations"][INDEX_KEY])["digest"]
    holds = [Hold(), Hold()]
    for hold, digest in zip(holds, (manifest["config"]["digest"], index), strict=True):
        registry.faults.add(hold, path=digest)

    async def release() -> None:
        # Both are held until both have come.
        for hold in holds:
            await hold.arrived.wait()
        for hold in holds:
            hold.release.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(release)
        with trio.fail_after(20):
            async with open_image(f"{registry.host}/app:v1", settings):
                pass


async def test_with_the_registry_gone_a_known_digest_still_opens(
    registry: ScriptedRegistry, settings: Settings
) -> None:
    async with open_image(f"{registry.host}/app:v1", settings) as image:
        pinned = f"{registry.host}/app@{image.manifest.digest}"
    async with registry.down(), open_image(pinned, settings) as image:
        assert node_at(image.index, b"big") is not None


async def test_damaged_local_copies_are_dropped_and_fetched_again(
    registry: ScriptedRegistry, settings: Settings
) -> None:
    reference = f"{registry.host}/app:v1"
    async with open_image(reference, settings) as image:
        pinned = f"{registry.host}/app@{image.manifest.digest}"
    copies = [path for path in (settings.cache_dir / "blobs").rglob("*") if path.is_file()]
    assert len(copies) == 3
    for damage in (lambda data: data[:-1], lambda data: data + b"x", lambda data: bytes(len(data))):
        for copy in copies:
            copy.write_bytes(damage(copy.read_bytes()))
        del registry.requests[:]
        async with open_image(pinned, settings):
            pass
        assert len(registry.requests) == 3
        assert all(copy.name == hashlib.sha256(copy.read_bytes()).hexdigest() for copy in copies)


async def test_what_is_known_is_not_written_again(registry: ScriptedRegistry, settings: Settings) -> None:
    def copies() -> dict[Path, int]:
        return {
            path: path.stat().st_ino for path in (settings.cache_dir / "blobs").rglob("*") if path.is_file()
        }

    known = []
    for _ in range(2):
        async with open_image(f"{registry.host}/app:v1", settings):
            known.append(copies())
    assert len(known[0]) == 3
    assert known[1] == known[0]


async def test_a_cache_that_cannot_be_written_costs_only_itself(
    registry: ScriptedRegistry, settings: Settings
) -> None:
    settings.cache_dir.mkdir()
    for name in ("blobs", "sections"):
        (settings.cache_dir / name).write_text("in the way")
    for _ in range(2):
        async with open_image(f"{registry.host}/app:v1", settings) as image:
            assert node_at(image.index, b"big") is not None
    assert len(registry.requests) == 6


async def test_a_bit_that_flips_on_the_way_is_asked_for_again_and_one_that_stays_is_an_error(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    manifest = app.manifest("v1")
    digests = (manifest["config"]["digest"], json.loads(manifest["annotations"][INDEX_KEY])["digest"])
    for digest in digests:
        registry.faults.add(FlipBit(20), path=digest)
    async with open_image(f"{registry.host}/app:v1", settings):
        pass
    assert len(registry.requests) == 5
    for digest in digests:
        registry.faults.clear()
        registry.faults.add(FlipBit(20), path=digest, count=None)
        fresh = replace(settings, cache_dir=settings.cache_dir / digest[-5:])
        with pytest.raises(IntegrityError, match=digest):
            async with open_image(f"{registry.host}/app:v1", fresh):
                pass


def without_annotation(layout: Layout, tag: str) -> None:
    """Give the manifest, without its annotation, another tag; move the referrer over."""
    layout.change("v1", tag, annotations={})
    subject = {key: layout.tags()[tag][key] for key in ("mediaType", "digest", "size")}
    index = json.loads((layout.path / "index.json").read_text())
    for entry in index["manifests"]:
        document = layout.document(entry["digest"])
        if "subject" in document:
            document["subject"] = subject
            entry |= layout.store(document["mediaType"], json.dumps(document).encode())
    (layout.path / "index.json").write_text(json.dumps(index))


async def test_an_index_is_found_by_its_referrer_alone(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    without_annotation(app, "bare")
    async with open_image(f"{registry.host}/app:bare", settings) as image:
        assert image.index_origin == "referrer"
        assert node_at(image.index, b"big") is not None
    async with open_image(app.ref("bare"), settings) as image:
        assert image.index_origin == "referrer"


async def test_without_an_index_the_error_says_what_to_do_and_inspect_still_works(
    registry: ScriptedRegistry, settings: Settings
) -> None:
    reference = f"{registry.host}/source:v1"
    with pytest.raises(UnsupportedFormat, match="has no index") as caught:
        async with open_image(reference, settings):
            pass
    assert f"veneer convert {reference}" in (caught.value.hint or "")
    summary = await inspect_image(reference, settings)
    assert not summary.lazy
    assert [layer.lazy for layer in summary.layers] == [False, False]
    assert "gzip" in summary.layers[0].reason
    lazy = await inspect_image(f"{registry.host}/app:v1", settings)
    assert lazy.lazy
    assert lazy.files["files"] > 0
    assert lazy.to_json()["lazy"] is True


async def test_an_image_copied_without_its_index_says_so(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    index = json.loads(app.manifest("v1")["annotations"][INDEX_KEY])
    app.file(index["digest"]).unlink()
    with pytest.raises(NotFound, match=r"index of .* is missing") as caught:
        async with open_image(f"{registry.host}/app:v1", settings):
            pass
    assert "veneer convert" in (caught.value.hint or "")


async def test_an_index_of_other_layers_is_refused(
    registry: ScriptedRegistry, app: Layout, settings: Settings, tmp_path: Path
) -> None:
    manifest = app.manifest("v1")
    write_image([(TarItem(b"other"),), (TarItem(b"another"),)], tmp_path / "other-source", "v1")
    other = Layout(tmp_path / "other")
    await convert(f"oci:{tmp_path / 'other-source'}:v1", other.ref("v1"), settings)
    foreign = json.loads(other.manifest("v1")["annotations"][INDEX_KEY])
    app.store(foreign["mediaType"], other.file(foreign["digest"]).read_bytes())
    config = app.document(manifest["config"]["digest"])
    config["rootfs"]["diff_ids"].reverse()
    reversed_config = app.store(manifest["config"]["mediaType"], json.dumps(config).encode())
    del config["rootfs"]["diff_ids"][:1]
    short_config = app.store(manifest["config"]["mediaType"], json.dumps(config).encode())
    changes: dict[str, Any] = {
        "foreign": {"annotations": {INDEX_KEY: json.dumps(foreign)}},
        "reordered": {"layers": manifest["layers"][::-1]},
        "fewer": {"layers": manifest["layers"][:1]},
        "shorter": {"layers": manifest["layers"][:1], "config": short_config},
        "resized": {"layers": [{**layer, "size": layer["size"] + 1} for layer in manifest["layers"]]},
        "rediffed": {"config": reversed_config},
    }
    for tag, members in changes.items():
        app.change("v1", tag, **members)
        with pytest.raises(IntegrityError):
            async with open_image(f"{registry.host}/app:{tag}", settings):
                pass


async def test_documents_of_another_size_than_stated_are_refused(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    """Also where the document is known already, and before a huge one is asked for."""
    async with open_image(f"{registry.host}/app:v1", settings):
        pass
    config, entry = app.manifest("v1")["config"], app.tags()["v1"]
    kind = "application/vnd.oci.image.index.v1+json"
    for number, size in enumerate((1, -1, 1 << 30)):
        app.change("v1", f"config{number}", config={**config, "size": config["size"] + size})
        platform = {"os": "linux", "architecture": "amd64"}
        stated = {**entry, "size": entry["size"] + size, "annotations": {}, "platform": platform}
        index = {"schemaVersion": 2, "mediaType": kind, "manifests": [stated]}
        app.tag(f"manifest{number}", app.store(kind, json.dumps(index).encode()))
        for what in ("config", "manifest"):
            del registry.requests[:]
            with pytest.raises(IntegrityError):
                async with open_image(f"{registry.host}/app:{what}{number}", settings):
                    pass
            if size > 1:
                assert len(registry.requests) == 1, "the one by tag"


@pytest.mark.parametrize(
    ("annotation", "error"),
    [
        ("not json", IntegrityError),
        ("{}", IntegrityError),
        ("[" * 3000, IntegrityError),
        ("x" * 5000, IntegrityError),
        (
            '{"mediaType":"application/vnd.veneer.index.v2","digest":"sha256:%s","size":5}' % ("0" * 64),
            UnsupportedFormat,
        ),
        (
            '{"mediaType":"application/vnd.veneer.index.v1","digest":"sha256:%s","size":9999999999}'
            % ("0" * 64),
            IntegrityError,
        ),
    ],
)
async def test_malformed_annotations_are_refused_and_nothing_else_is_tried(
    annotation: str, error: type[Exception], registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    app.change("v1", "odd", annotations={INDEX_KEY: annotation})
    with pytest.raises(error):
        async with open_image(f"{registry.host}/app:odd", settings):
            pass
    assert not registry.asked("GET", "/referrers/")


@pytest.mark.parametrize(
    ("version", "hint"),
    [(0, "convert the image again with this version of veneer"), (2, "a newer veneer may read it")],
)
async def test_an_index_of_another_version_says_what_to_do(
    version: int, hint: str, registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    named = json.loads(app.manifest("v1")["annotations"][INDEX_KEY])
    data = app.file(named["digest"]).read_bytes()
    annotations = {
        "named": named | {"mediaType": f"application/vnd.veneer.index.v{version}"},
        "inside": app.store(named["mediaType"], data[:8] + bytes([version]) + data[9:])
        | {"annotations": named["annotations"]},
    }
    for tag, annotation in annotations.items():
        app.change("v1", tag, annotations={INDEX_KEY: json.dumps(annotation)})
        with pytest.raises(UnsupportedFormat, match=f"version {version} of the format") as caught:
            async with open_image(f"{registry.host}/app:{tag}", settings):
                pass
        assert caught.value.hint == hint


async def test_a_damaged_index_is_refused(registry: ScriptedRegistry, app: Layout, settings: Settings) -> None:
    index = json.loads(app.manifest("v1")["annotations"][INDEX_KEY])
    data = app.file(index["digest"]).read_bytes()
    for number, offset in enumerate((0, 8, 100, len(data) - 1)):
        flipped = data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]
        descriptor = {**app.store(index["mediaType"], flipped), "annotations": index["annotations"]}
        app.change("v1", f"bad{number}", annotations={INDEX_KEY: json.dumps(descriptor)})
        with pytest.raises((IntegrityError, UnsupportedFormat)):
            async with open_image(f"{registry.host}/app:bad{number}", settings):
                pass


async def test_platforms_are_chosen_and_a_wrong_one_is_mentioned(
    registry: ScriptedRegistry, app: Layout, settings: Settings
) -> None:
    entry = {**app.tags()["v1"], "platform": {"os": "linux", "architecture": "amd64"}}
    entry.pop("annotations")
    kind = "application/vnd.oci.image.index.v1+json"
    for tag, inner in (("multi", entry), ("nested", None)):
        manifests = [inner or {**app.tags()["multi"], "annotations": {}, "platform": entry["platform"]}]
        app.tag(
            tag,
            app.store(
                kind, json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": manifests}).encode()
            ),
        )
    arm = replace(settings, platform=Platform("linux", "arm64"))
    for tag in ("multi", "nested"):
        async with open_image(f"{registry.host}/app:{tag}", settings) as image:
            assert node_at(image.index, b"big") is not None
        with pytest.raises(NotFound, match="arm64") as caught:
            async with open_image(f"{registry.host}/app:{tag}", arm):
                pass
        assert "linux/amd64" in (caught.value.hint or "")
    events: list[Event] = []
    async with open_image(f"{registry.host}/app:v1", arm, report=events.append):
        assert any(isinstance(event, Notice) and "not for linux/arm64" in event.message for event in events)


class TestSections:
    """A new image over a known base: its index is fetched in part."""

    @pytest.fixture
    async def stacked(
        self, registry: ScriptedRegistry, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> str:
        """Images ``stack:1`` and ``stack:2``, which share a base of many files."""
        monkeypatch.setattr("veneer.formats.native.MIN_INDEX_SIZE", 8 << 10)
        dice = random.Random(1)
        base = [TarItem(b"%032x" % dice.getrandbits(128)) for _ in range(4_000)]
        for tag in ("1", "2"):
            top = [TarItem(tag.encode() + b"%016x" % dice.getrandbits(64)) for _ in range(1_000)]
            write_image([tuple(base), tuple(top)], tmp_path / "stack-source", tag)
            elsewhere = replace(settings, cache_dir=tmp_path / "convert-cache")
            await convert(f"oci:{tmp_path / 'stack-source'}:{tag}", f"{registry.host}/stack:{tag}", elsewhere)
        del registry.requests[:]
        return f"{registry.host}/stack"

    @staticmethod
    async def fetched(registry: ScriptedRegistry, reference: str, settings: Settings) -> tuple[int, int, int]:
        """Requests for the index, bytes of it, and its size."""
        del registry.requests[:]
        async with open_image(reference, settings) as image:
            assert len(list(image.index.walk())) == 5_001
            assert image.index_descriptor is not None
            digest, size = str(image.index_descriptor.digest), image.index_descriptor.size
        of_index = registry.asked("GET", digest)
        return len(of_index), sum(record.bytes_sent for record in of_index), size

    async def test_known_base_layers_are_not_fetched_again(
        self, registry: ScriptedRegistry, stacked: str, settings: Settings
    ) -> None:
        requests, sent, size = await self.fetched(registry, stacked + ":1", settings)
        assert (requests, sent) == (1, size)
        requests, sent, size = await self.fetched(registry, stacked + ":2", settings)
        assert requests == 2
        assert sent < size / 2

    async def test_damaged_sections_are_fetched_again(
        self, registry: ScriptedRegistry, stacked: str, settings: Settings
    ) -> None:
        await self.fetched(registry, stacked + ":1", settings)
        for path in (settings.cache_dir / "sections").rglob("*"):
            if path.is_file():
                path.write_bytes(bytes(path.stat().st_size))
        requests, sent, size = await self.fetched(registry, stacked + ":2", settings)
        assert (requests, sent) == (2, size)

    @pytest.mark.parametrize(("offset", "expected"), [(20, 2), (-5, 3)])
    async def test_bits_that_flip_in_a_range_lead_to_the_whole_index(
        self, offset: int, expected: int, registry: ScriptedRegistry, stacked: str, settings: Settings
    ) -> None:
        await self.fetched(registry, stacked + ":1", settings)
        async with open_image(
            stacked + ":2", replace(settings, cache_dir=settings.cache_dir / "other")
        ) as image:
            assert image.index_descriptor is not None
            size = image.index_descriptor.size
        registry.faults.add(FlipBit(offset % size), when=lambda request: request.header("range") is not None)
        requests, sent, _ = await self.fetched(registry, stacked + ":2", settings)
        assert requests == expected
        assert sent > size
