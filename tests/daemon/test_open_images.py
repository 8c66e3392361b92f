"""Which open image is had again without opening it: only one that would be opened in the same way."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.daemon.layouts import settings_in
from veneer.daemon.open_images import Asked, Holding, OpenImages, identity
from veneer.image.packs import local_pack_note
from veneer.image.tags import note_tag
from veneer.oci.digest import Digest
from veneer.oci.reference import parse_reference
from veneer.settings import Settings

MANIFEST = Digest.of(b"manifest")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path, pull="missing")


def a_holding(origin: str = "annotation") -> Any:
    manifest, config = SimpleNamespace(digest=MANIFEST), SimpleNamespace(diff_ids=(Digest.of(b"layer"),))
    image: Any = SimpleNamespace(index_origin=origin, manifest=manifest, config=config)
    device: Any = SimpleNamespace(refuted=None)
    return Holding(image, cast("Any", "the store"), (device,), cast("Any", None))


def asked(settings: Settings, workload: str | None = "default") -> Asked:
    return Asked("image", settings, workload, cast("Any", "the store"))


@pytest.mark.parametrize(
    ("origin", "told"), [("annotation", True), ("local", True), ("referrer", False), ("streamed", False)]
)
async def test_an_index_that_is_looked_for_elsewhere_is_looked_for_again(
    settings: Settings, origin: str, told: bool
) -> None:
    images, holding = OpenImages(), a_holding(origin)
    await images.remember(asked(settings), holding)
    assert await images.unchanged(asked(settings)) is (holding if told else None)


async def test_only_what_was_asked_for_in_the_same_way_is_the_same(settings: Settings) -> None:
    images, holding = OpenImages(), a_holding()
    await images.remember(asked(settings), holding)
    await images.remember(asked(settings, None), a_holding())
    for other in (
        asked(settings, None),
        asked(settings, "other"),
        asked(replace(settings, referrers="ignore")),
    ):
        assert await images.unchanged(other) is None
    found = await images.unchanged(asked(settings))
    assert found is holding
    images.forget(found)
    assert await images.unchanged(asked(settings)) is None


async def test_an_image_is_opened_anew_when_this_host_knows_more_of_it(settings: Settings) -> None:
    images, holding = OpenImages(), a_holding()
    await images.remember(asked(settings), holding)
    note = local_pack_note(settings.cache_dir, MANIFEST, "default")
    note.parent.mkdir(parents=True)
    note.write_bytes(b"a pack")
    assert await images.unchanged(asked(settings)) is None
    note.unlink()
    assert await images.unchanged(asked(settings)) is holding


async def test_what_is_wrong_or_in_nobodys_use_is_not_had_again(settings: Settings) -> None:
    images, holding = OpenImages(), a_holding()
    await images.remember(asked(settings), holding)
    for refuted, users, had in ((ValueError("not the layer"), 1, False), (None, 1, True), (None, 0, False)):
        holding.attached[0].refuted, holding.users = refuted, users
        assert await images.unchanged(asked(settings)) is (holding if had else None)


async def test_a_reference_is_the_image_that_it_named_as_long_as_nothing_has_changed(
    settings: Settings,
) -> None:
    images, holding = OpenImages(), a_holding()
    text, digest = "registry.example/app:v1", Digest.of(b"index of platforms")
    (settings.cache_dir / "devices").mkdir(parents=True)

    def named(settings: Settings) -> None:
        repository = SimpleNamespace(name="registry.example/app")
        contents = SimpleNamespace(repository=repository, tagged=digest)
        resolved: Any = SimpleNamespace(reference=parse_reference(text), contents=contents)
        images.note_name(text, asked(settings), resolved)

    async def recalled(settings: Settings, *, right: bool = True) -> bool:
        found = await images.recall(
            text, settings, "default", lambda *store: right and store[3] == identity(settings.cache_dir)
        )
        assert found in (None, holding)
        return found is not None

    tags = settings.cache_dir / "tags"
    note_tag(tags, "registry.example/app", "v1", digest)
    always = replace(settings, pull="always")
    for each in (settings, always):
        await images.remember(asked(each), holding)
        named(each)
    assert await recalled(settings)
    assert not await recalled(always), "the registry is to be asked"
    assert not await recalled(settings, right=False)
    note_tag(tags, "registry.example/app", "v1", Digest.of(b"another one"))
    assert not await recalled(settings)
    note_tag(tags, "registry.example/app", "v1", digest)
    assert await recalled(settings)
    note = local_pack_note(settings.cache_dir, MANIFEST, "default")
    note.parent.mkdir(parents=True)
    note.write_bytes(b"a pack")
    assert not await recalled(settings)
    note.unlink()
    holding.attached[0].refuted = ValueError("not the layer")
    assert not await recalled(settings)
    holding.attached[0].refuted = None
    images.forget(holding)
    assert not await recalled(settings)
