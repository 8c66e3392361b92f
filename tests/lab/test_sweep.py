"""Sweeps: sizes are those of real conversions, what is varied varies, and the results can be read again."""

import json
from pathlib import Path

import pytest
import trio

from tests.cli.invoking import invoke
from tests.daemon.conftest import image, sample_layout, settings, workplace
from tests.daemon.test_packs import profile_of
from tests.lab.results import write_results
from veneer.convert import pack as packing
from veneer.convert.cut import FRAME_SIZE
from veneer.convert.frames import LEVEL
from veneer.convert.local import make_local_pack
from veneer.errors import UnsupportedFormat
from veneer.image import open_image
from veneer.lab.report import make_report
from veneer.lab.sweep_packs import PACK_SPANS
from veneer.lab.sweep_record import Sweep, read_sweep
from veneer.prefetch.profile import Profile
from veneer.settings import Settings

__all__ = ["image", "sample_layout", "settings", "workplace"]

pytestmark = pytest.mark.root


async def start_profile(image: str, settings: Settings) -> Profile:
    """Two parts of a program and a small file."""
    async with open_image(image, settings) as opened:
        await opened.load()
        hot = [(b"bin/busybox", 0, 400_000), (b"etc/hello", 0, 6), (b"bin/busybox", 900_000, 200_000)]
        return profile_of(opened, *hot)


@pytest.fixture
def swept(workplace: Path, settings: Settings, image: str) -> Path:
    """The file of a sweep over the sample image."""
    profile = trio.run(start_profile, image, settings)
    (workplace / "profile.json").write_bytes(profile.to_json())
    output = workplace / "sweep.json"
    done = invoke(
        *("lab", "sweep", image, str(workplace / "profile.json"), "-o", str(output)),
        *("--networks", "0ms,50ms-100mbit", "--no-progress", "--quiet"),
        env={"VENEER_CACHE_DIR": str(settings.cache_dir)},
    )
    assert done.exit_code == 0, done.stderr
    assert "128 KiB (default)" in done.stdout
    return output


def by_name(sweep: Sweep, group: str, name: str = "") -> int:
    (found,) = (one.stored for one in sweep.groups[group] if (one.name == name if name else one.default))
    return found


def test_a_sweep(swept: Path, settings: Settings, image: str) -> None:
    sweep = read_sweep(swept)

    async def sizes() -> tuple[int, int]:
        async with open_image(image, settings) as opened:
            made = await make_local_pack(image, await start_profile(image, settings), settings)
            return opened.manifest.layers[0].size, made.pack.blob.size

    layer, pack = trio.run(sizes)
    # The default of each group is what a conversion makes.
    for group in ("frame size", "small files", "level"):
        assert by_name(sweep, group) == layer
        assert [one.default for one in sweep.groups[group]].count(True) == 1
    for group in ("pack span size", "pack level", "pack window", "pack grain", "pack order"):
        assert by_name(sweep, group) == pytest.approx(pack, rel=0.03)
    assert by_name(sweep, "level", "1") > by_name(sweep, "level", "19")
    assert by_name(sweep, "frame size", "32 KiB") > by_name(sweep, "frame size", "1 MiB")
    assert by_name(sweep, "pack grain", "whole files") > by_name(sweep, "pack grain", "4 KiB")
    (pulled,) = (one.starts["50ms-100mbit"] for one in sweep.groups["one stream"] if one.name == "gzip -6")
    assert pulled["seconds"] == pytest.approx(0.050 + pulled["bytes"] / 12.5e6)
    for one in sweep.trials:
        near, far = one.starts["0ms"], one.starts["50ms-100mbit"]
        assert near["seconds"] < far["seconds"]
        assert min(near["requests"], far["requests"]) >= 1
        assert far["seconds"] >= 0.050 * (not one.group.startswith("pack"))

    directory = swept.parent / "results"
    write_results(directory, blocks=1)
    page = make_report(directory, sweeps=[swept])
    assert "frame size: seconds that a start waits" in page
    assert "128 KiB (default)" in page
    document = json.loads(swept.read_text())
    swept.write_text(json.dumps(document | {"schema": 2}))
    with pytest.raises(UnsupportedFormat):
        read_sweep(swept)


def test_defaults_are_those_of_conversions() -> None:
    assert PACK_SPANS[2] == (packing._FIRST_SPAN, packing._LAST_SPAN)
    assert (FRAME_SIZE, LEVEL, packing.LEVEL) == (128 << 10, 6, 19)


def test_wrong_numbers_are_refused(workplace: Path, image: str) -> None:
    profile = workplace / "p.json"
    profile.write_text("{}")
    assert invoke("lab", "sweep", image, str(profile), "--sample", "0").exit_code == 2
    assert invoke("lab", "sweep", image, str(profile), "--think", "-1").exit_code == 2
    assert invoke("lab", "sweep", image, str(profile)).exit_code == 20
