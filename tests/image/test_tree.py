"""The tree of an image: nobody pays for it before it is wanted, and a bad one is an error then."""

import json
import threading
from contextlib import aclosing
from pathlib import Path

import pytest
import trio

from tests.convert.layouts import Layout
from tests.index.trees import unpack_index
from veneer.convert.convert import convert
from veneer.errors import IntegrityError
from veneer.image import image as image_module
from veneer.image import open_image
from veneer.image.files import read_file
from veneer.image.inspect import inspect_image
from veneer.index import wire
from veneer.index.build import TreeBuilder
from veneer.index.merge import merge
from veneer.index.model import ImageIndex, LayerIndex, LayerTree, MetadataPolicy
from veneer.index.tar import TarParser
from veneer.index.wire import pack_index
from veneer.settings import Settings
from veneer.store.spanstore import open_store
from veneer.testing.images import write_image
from veneer.testing.tars import TarItem, tar
from veneer.testing.trees import node_at
from veneer.verify import verify_image

INDEX_KEY = "dev.veneer.index"


@pytest.fixture
async def lazy(tmp_path: Path, settings: Settings) -> Layout:
    """Has an image of two layers, ``v1``."""
    layers = [(TarItem(b"base", content=b"b" * 5000),), (TarItem(b"top", content=b"t"),)]
    write_image(layers, tmp_path / "source", "v1")
    await convert(f"oci:{tmp_path / 'source'}:v1", f"oci:{tmp_path / 'lazy'}:v1", settings)
    return Layout(tmp_path / "lazy")


@pytest.fixture(params=["nonsense", "link to nothing"])
def treeless(lazy: Layout, request: pytest.FixtureRequest) -> str:
    """An image whose index has all the right digests and devices, but the trees make no tree."""
    descriptor = json.loads(lazy.manifest("v1")["annotations"][INDEX_KEY])
    layers, policy = unpack_index(lazy.file(descriptor["digest"]).read_bytes())
    data = nonsense(layers, policy) if request.param == "nonsense" else link_to_nothing(layers, policy)
    lie = lazy.store(descriptor["mediaType"], data)
    lazy.change("v1", "lie", annotations={INDEX_KEY: json.dumps(lie)})
    return lazy.ref("lie")


def nonsense(layers: tuple[LayerIndex, ...], policy: MetadataPolicy) -> bytes:
    honest = wire.encode_tree

    def lie(tree: LayerTree, device_size: int) -> bytes:
        return b"nonsense" if tree is layers[1].tree else honest(tree, device_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "encode_tree", lie)
        return pack_index(layers, policy)


def link_to_nothing(layers: tuple[LayerIndex, ...], policy: MetadataPolicy) -> bytes:
    parser, builder = TarParser(), TreeBuilder()
    for entry in [*parser.feed(tar([TarItem(b"name", "link", link=b"missing")])), *parser.finish()]:
        builder.add(entry)
    return pack_index([layers[0], LayerIndex(builder.finish(), layers[1].device)], policy)


async def test_an_image_opens_without_its_tree(
    lazy: Layout, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "decode_tree", lambda *_: pytest.fail("decoded"))
    async with open_image(lazy.ref("v1"), settings) as image:
        assert [device.blob.digest for device in image.devices] == [
            layer.digest for layer in image.manifest.layers
        ]
        assert [device.diff_id for device in image.devices] == list(image.config.diff_ids)
        assert [source.size for source in image.sources] == [device.blob.size for device in image.devices]
        assert image.policy.devices == "drop"
        assert all(note.lazy and note.spans for note in image.layers)


async def test_the_tree_is_made_once_and_not_in_the_event_loop(
    lazy: Layout, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def counted(layers: tuple[LayerIndex, ...], policy: MetadataPolicy) -> ImageIndex:
        threads.append(threading.get_ident())
        return merge(layers, policy)

    monkeypatch.setattr(image_module, "merge", counted)
    async with open_image(lazy.ref("v1"), settings) as image:
        found: list[ImageIndex] = []

        async def load() -> None:
            found.append(await image.load())

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(load)
        assert threading.get_ident() not in threads
        assert image.index is found[0]
        assert await image.load() is found[0]
        assert all(one is found[0] for one in found)
        assert found[0].devices == image.devices
        assert node_at(found[0], b"base") is not None
    assert len(threads) == 1


async def test_the_tree_comes_without_an_event_loop_too(lazy: Layout, settings: Settings) -> None:
    async with open_image(lazy.ref("v1"), settings) as image:
        tree = image.index
        assert node_at(tree, b"top") is not None
        assert await image.load() is tree


async def test_a_bad_tree_is_an_error_for_whoever_wants_it(treeless: str, settings: Settings) -> None:
    async with open_image(treeless, settings) as image, open_store(settings) as store:
        assert len(image.devices) == 2, "what is not in the tree is there"
        for _ in range(2):
            with pytest.raises(IntegrityError) as caught:
                await image.load()
            assert image.name in caught.value.message
            with pytest.raises(IntegrityError):
                image.index  # noqa: B018 - has to be asked for
        async with aclosing(read_file(image, store, b"base")) as pieces:
            with pytest.raises(IntegrityError):
                await anext(pieces)
        with pytest.raises(IntegrityError):
            await verify_image(image)
    with pytest.raises(IntegrityError):
        await inspect_image(treeless, settings)


async def test_a_bad_tree_is_not_copied(treeless: str, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError):
        await convert(treeless, f"oci:{tmp_path / 'copy'}:v1", settings)
