"""Static profiles from conversion to start: made unasked, used, and the last choice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.cli.invoking import invoke
from tests.convert.layouts import Layout
from tests.daemon.layouts import LARGE, busybox_layer, settings_in
from tests.daemon.test_daemon import to_registry
from tests.daemon.test_packs import blobs_of, fetched
from veneer.container.options import ContainerOptions
from veneer.convert.convert import convert
from veneer.convert.local import make_local_pack, make_static_profile
from veneer.daemon.client import RunRequest, RunResult, run_image
from veneer.errors import NotFound
from veneer.image import open_image
from veneer.image.profiles import keep_profile
from veneer.oci.digest import Digest
from veneer.prefetch.profile import Profile
from veneer.settings import Settings
from veneer.testing.images import write_image
from veneer.testing.registry import scripted_registry
from veneer.testing.tars import TarItem

pytestmark = [pytest.mark.root]

CONFIG = {"Cmd": ["hello"], "Env": ["PATH=/opt:/bin"]}
HELLO = TarItem(b"opt/hello", mode=0o755, content=b"#!/bin/sh\necho hello\n")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The backend that maps files to packs."""
    return replace(settings, backend="erofs-fanotify")


@pytest.fixture
def plain(tmp_path: Path) -> str:
    """An image that was not converted."""
    large = TarItem(b"large", content=LARGE)
    write_image([busybox_layer(large), (HELLO,)], tmp_path / "plain", "v1", config=CONFIG)
    return f"oci:{tmp_path}/plain:v1"


def run(image: str, settings: Settings, *words: str) -> RunResult:
    return run_image(RunRequest(image, ContainerOptions(arguments=words)), settings)


def profile_of(image: str, settings: Settings, *words: str) -> Profile:
    async def make() -> Profile:
        return await make_static_profile(image, words, settings)

    return trio.run(make)


def converted(plain: str, target: str, settings: Settings, **options: object) -> None:
    async def make() -> None:
        await convert(plain, target, settings, **{"static": (), **options})  # type: ignore[arg-type] # its options

    trio.run(make)


@pytest.mark.network
def test_a_start_with_a_static_pack_needs_nothing_of_the_layers(
    workplace: Path, plain: str, settings: Settings
) -> None:
    converted(plain, f"oci:{workplace}/layout:packed", settings)
    blobs = blobs_of(workplace / "layout", "packed")
    manifest = Layout(workplace / "layout").manifest("packed")

    async def main() -> None:
        async with scripted_registry(to_registry(workplace)) as registry:
            name = f"{registry.host}/team/app:packed"
            result = await trio.to_thread.run_sync(run, name, settings)
            assert result.exit_code == 0
            assert result.report is not None
            pack = result.report.pack
            assert pack is not None
            assert (pack.static, pack.mapped) == (True, True)
            assert fetched(registry, blobs["data"])
            for layer in manifest["layers"]:
                assert fetched(registry, layer["digest"]) == []

    trio.run(main)


def test_converting_twice_gives_the_same_image(workplace: Path, plain: str, settings: Settings) -> None:
    digests = set()
    for name in ("one", "two"):
        converted(plain, f"oci:{workplace}/{name}:v1", settings_in(workplace / "of" / name))
        index = json.loads((workplace / name / "index.json").read_bytes())
        digests |= {one["digest"] for one in index["manifests"] if one.get("annotations")}
    assert len(digests) == 1


def test_what_was_recorded_wins(workplace: Path, plain: str, settings: Settings) -> None:
    lazy = f"oci:{workplace}/layout:lazy"
    converted(plain, lazy, settings, static=None)
    recorded = replace(profile_of(lazy, settings), runs=1)

    async def packs(image: str) -> tuple[str, bool]:
        async with open_image(image, settings, pack="default") as opened:
            assert opened.pack is not None
            return opened.pack.named.origin, opened.pack.named.static

    given = f"oci:{workplace}/layout:given"
    converted(plain, given, settings, profiles=[recorded])
    assert trio.run(packs, given) == ("annotation", False)
    static = f"oci:{workplace}/layout:static"
    converted(plain, static, settings)
    assert trio.run(packs, static) == ("annotation", True)

    async def local() -> None:
        await make_local_pack(static, recorded, settings)

    trio.run(local)
    assert trio.run(packs, static) == ("local", False), "this host's own is better than one made unasked"

    async def local_given() -> None:
        await make_local_pack(given, recorded, settings)

    trio.run(local_given)
    assert trio.run(packs, given) == ("annotation", False), "but not than one that was recorded"


def test_a_command_may_be_given_in_place_of_the_images(workplace: Path, plain: str, settings: Settings) -> None:
    image = f"oci:{workplace}/layout:lazy"
    env = {"VENEER_CACHE_DIR": str(settings.cache_dir)}
    done = invoke("convert", "--workload-command", "cat /etc/hello", plain, image, "--json", env=env)
    assert done.exit_code == 0, done.stderr
    assert [pack["static"] for pack in json.loads(done.stdout)["images"][0]["packs"]] == [True]
    with_script = profile_of(image, settings)
    without = profile_of(image, settings, "cat", "/etc/hello")
    assert len(with_script.layers) == 2
    assert len(without.layers) == 1
    none = invoke("convert", "--no-static", plain, f"oci:{workplace}/layout:none", "--json", env=env)
    assert json.loads(none.stdout)["images"][0]["packs"] == []


def test_a_command_that_is_not_there_has_no_profile(workplace: Path, plain: str, settings: Settings) -> None:
    image = f"oci:{workplace}/layout:lazy"
    converted(plain, image, settings)
    with pytest.raises(NotFound, match="no-such"):
        profile_of(image, settings, "no-such", "thing")
    converted(plain, f"oci:{workplace}/layout:other", settings, static=("no-such",))


def test_the_command_keeps_it_unless_a_recorded_one_is_there(
    workplace: Path, plain: str, settings: Settings
) -> None:
    image = f"oci:{workplace}/layout:lazy"
    converted(plain, image, settings)
    env = {"VENEER_CACHE_DIR": str(settings.cache_dir)}
    done = invoke("profile", "static", image, "-o", str(workplace / "p.json"), env=env)
    assert done.exit_code == 0, done.stderr
    shown = json.loads(invoke("profile", "show", image, "--json", env=env).stdout)
    assert (shown["origin"], shown["workloads"], shown["runs"]) == ("static", ["default"], 0)
    assert {file["path"] for file in shown["files"]} >= {"/bin/busybox", "/opt/hello"}
    assert "static" in invoke("profile", "show", image, env=env).stdout
    recorded = replace(Profile.parse((workplace / "p.json").read_bytes()), runs=3)
    keep_profile(settings.cache_dir, Digest.parse(recorded.image), recorded)
    again = invoke("profile", "static", image, env=env)
    assert again.exit_code == 2
    assert "recorded" in again.stderr
    assert invoke("profile", "static", "--workload", "x", image, "--", "cat", env=env).exit_code == 0
    assert "other workloads of the image: x" in invoke("profile", "show", image, env=env).stdout
