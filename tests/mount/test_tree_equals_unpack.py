"""What a mount shows is what unpacking the image's layers leaves on disk."""

import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.daemon.layouts import lazy_image, settings_in
from tests.mount.guarding import guards
from veneer.convert.sidecar import make_sidecar
from veneer.image import open_image
from veneer.mount.backends import Subject, open_mounter
from veneer.mount.base import Choice, Mounter
from veneer.mount.filetable import FileTable
from veneer.mount.resident import ResidentMounter
from veneer.mount.session import mounted
from veneer.store.spanstore import open_store
from veneer.testing.images import Layer, random_layers, write_image
from veneer.testing.tars import TarItem, opaque, tar, whiteout
from veneer.testing.trees import Fact, difference, scan
from veneer.testing.unpack import unpack_layers

pytestmark = [pytest.mark.root, pytest.mark.fuse]

BACKENDS = ("fuse", "erofs-fuse", "erofs-fanotify")
#: How the image is stored, and what becomes of device nodes; layers without an index never keep them.
FORMS = (
    ("native", "drop"),
    ("native", "keep"),
    ("gzip", "drop"),
    ("zstd", "drop"),
    ("none", "drop"),
    ("gzip with a sidecar", "keep"),
    ("zstd with a sidecar", "drop"),
    ("none with a sidecar", "keep"),
)
#: FUSE here cannot tell holes, so comparing a file reads all of it; test_fuse.py reads larger ones in places.
LARGEST = 32 << 20


async def mounted_tree(
    layers: list[Layer], devices: str, form: str, backend: str, directory: Path
) -> dict[bytes, Fact]:
    configured = settings_in(directory)
    if form == "native":
        image_text = await lazy_image(directory / "image", configured, layers, devices=devices)
    else:
        compression, _, sidecar = form.partition(" ")
        write_image(layers, directory / "image", "plain", compression)
        image_text = f"oci:{directory}/image:plain"
        if sidecar:
            await make_sidecar(image_text, configured, push=False, devices=devices)
    origins = {"with a sidecar": "local"} | ({"": "annotation"} if form == "native" else {})
    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    async with open_store(configured) as store, open_image(image_text, configured, keeper=store) as image:
        assert image.index_origin == origins.get(form.partition(" ")[2], "streamed")
        attached = [store.attach(*pair) for pair in zip(image.devices, image.sources, strict=True)]
        subject = Subject(image.name, image.devices, lambda: image.index, image.identity, store, attached)
        cache_dir = configured.cache_dir
        if backend == "erofs-fanotify":
            async with guards() as shared:
                files, choice = FileTable(subject.index), Choice(backend, "")
                resident = ResidentMounter(shared, subject, store, files, cache_dir=cache_dir, choice=choice)
                found = await shown(resident, mountpoint)
        else:
            mounter = await open_mounter(backend, subject, cache_dir=cache_dir, devices=directory / "devices")
            found = await shown(mounter, mountpoint)
    return found


async def shown(mounter: Mounter, mountpoint: Path) -> dict[bytes, Fact]:
    async with mounted(mounter, mountpoint):
        return await trio.to_thread.run_sync(scan, mountpoint)


def differences(layers: list[Layer], devices: str, form: str, backend: str) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "unpacked").mkdir()
        unpack_layers([tar(layer) for layer in layers], directory / "unpacked", devices)
        found = trio.run(mounted_tree, layers, devices, form, backend, directory)
        return difference(scan(directory / "unpacked"), found)


@pytest.mark.parametrize("backend", BACKENDS)
@given(layers=random_layers(), made=st.sampled_from(FORMS))
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
def test_random_images(backend: str, layers: list[Layer], made: tuple[str, str]) -> None:
    assume(all(item.size <= LARGEST for layer in layers for item in layer))
    form, devices = made
    assert differences(layers, devices, form, backend) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_of_two_layers(backend: str) -> None:
    xattrs = ((b"user.a", b"1"), (b"security.capability", bytes.fromhex("0100000200200000" + "00" * 12)))
    base = (
        TarItem(b"a", "dir", 0o750, 1, 2, 5_000_000_001),
        TarItem(b"a/hidden", content=b"1"),
        TarItem(b"a/kept", mode=0o4711, uid=3, gid=4, content=b"kept" * 50_000, xattrs=xattrs),
        TarItem(b"a/link", "link", link=b"a/kept"),
        TarItem(b"b/c/gone", content=b"2"),
        TarItem(b"sparse", pieces=((0, b"x"), (1 << 20, b"y" * 5000)), size=3 << 20),
        TarItem(b"tty", "char", rdev=(5, 0)),
        TarItem(b"pipe", "fifo"),
    )
    change = (
        whiteout(b"a/hidden"),
        opaque(b"b"),
        TarItem(b"b/new", "symlink", link=b"../a/kept"),
    )
    assert differences([base, change], "keep", "native", backend) == []
    assert differences([base], "drop", "native", backend) == []
    assert differences([base, change], "drop", "gzip", backend) == []
    assert differences([base, change], "keep", "gzip with a sidecar", backend) == []
