"""Building the lab's images: root file systems by mmdebstrap from apt as it is set up, cut into layers by us.

All images lie in one OCI layout, as ordinary gzip layers: the base system, which all share, the packages on
top, and the files of the app. The same packages give the same bytes; which they were is kept beside each
image.

An image that is there and was made from the same definition is left alone.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import trio

from veneer.errors import IntegrityError, NotFound, UsageError
from veneer.events import Notice, Reporter, silent
from veneer.lab.decode import decode
from veneer.lab.imageset import RECIPE, SUITE, ImageSpec
from veneer.lab.layers import EPOCH, StoredLayer, Survey, app_layer, compress, difference, survey
from veneer.oci.canonical import canonical_json, parse_json
from veneer.oci.descriptor import Descriptor, Platform
from veneer.oci.digest import Digest
from veneer.oci.manifest import build_manifest
from veneer.oci.mediatypes import OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST
from veneer.source.layout import OCILayout

__all__ = ["BuiltImage", "build_images", "built_image", "layout_of", "store_image"]

_SOURCES = Path("/etc/apt/sources.list.d")
_ENV = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8")
#: python-sci takes a minute on a quiet machine.
_BUILD_DEADLINE_S = 1_800.0
_MAX_RECORD = 4 << 20
_STATUS = "./var/lib/dpkg/status"


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """What was made of a definition, as it is kept in ``NAME.json`` beside the layout.

    Args:
        name: of the image; its tag in the layout.
        definition: digest of what it was made from, packages' versions apart.
        digest: of the manifest.
        layers: how many.
        stored: bytes of the layers in the layout.
        size: bytes of their tars.
        packages: ``name=version`` of all that are installed in it, sorted.
    """

    name: str
    definition: str
    digest: str
    layers: int
    stored: int
    size: int
    packages: tuple[str, ...]


def layout_of(directory: Path) -> Path:
    """Where the OCI layout is in a directory of images."""
    return directory / "layout"


def built_image(directory: Path, image: ImageSpec) -> BuiltImage | None:
    """What is kept of an image; None when there is none of this definition. Raises IntegrityError."""
    path = _record(directory, image)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    built = decode(BuiltImage, parse_json(data, str(path), limit=_MAX_RECORD), str(path))
    return built if built.definition == _definition(image) else None


def build_images(
    images: Sequence[ImageSpec], directory: Path, *, force: bool = False, report: Reporter = silent
) -> list[BuiltImage]:
    """Build what is missing. Blocks.

    Args:
        images: which.
        directory: where they are kept; about 2 GB for all.
        force: build all of them anew.
        report: what happens.

    Raises:
        NotFound: mmdebstrap is not installed.
        UsageError: apt has no sources, or an installation failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    out: list[BuiltImage] = []
    base: _Base | None = None
    with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as scratch:
        for image in images:
            built = None if force else built_image(directory, image)
            if built is None:
                began = time.monotonic()
                base = base or _Base.build(Path(scratch), report)
                built = _build(image, base, directory, Path(scratch), report)
                report(Notice(f"built {image.name} in {time.monotonic() - began:.0f} s: {built.digest}"))
            out.append(built)
    return out


@dataclass(frozen=True, slots=True)
class _Base:
    """The layer that all images share."""

    contents: Survey
    layer: StoredLayer
    packages: tuple[str, ...]

    @classmethod
    def build(cls, scratch: Path, report: Reporter) -> "_Base":
        report(Notice("building the base system"))
        whole, tar = scratch / "base-whole.tar", scratch / "base.tar"
        _bootstrap((), whole)
        difference({}, whole, tar)
        packages = _packages(whole)
        whole.unlink()
        made = cls(survey(tar), compress(tar, scratch / "base.gz"), packages)
        tar.unlink()
        return made


def _build(image: ImageSpec, base: _Base, directory: Path, scratch: Path, report: Reporter) -> BuiltImage:
    report(Notice(f"building {image.name}: {', '.join(image.packages) or 'no packages'}"))
    layers, packages = [base.layer], base.packages
    if image.packages:
        whole = scratch / "whole.tar"
        _bootstrap(image.packages, whole)
        packages = _packages(whole)
        layers.append(_layer(scratch, "runtime", partial(_runtime, base, whole, image)))
        whole.unlink()
    return store_image(image, layers, directory, packages)


def store_image(
    image: ImageSpec, below: Sequence[StoredLayer], directory: Path, packages: tuple[str, ...] = ()
) -> BuiltImage:
    """Put the layer of the image's own files on others, and keep the image in ``directory``. Blocks."""
    directory.mkdir(parents=True, exist_ok=True)
    layers = list(below)
    with tempfile.TemporaryDirectory(prefix=".app-", dir=directory) as scratch:
        if image.files or image.synthetic:
            layers.append(_layer(Path(scratch), "app", partial(_app, image)))
        digest = trio.run(_store, image, layers, layout_of(directory))
    built = BuiltImage(
        image.name,
        _definition(image),
        str(digest),
        len(layers),
        sum(layer.stored for layer in layers),
        sum(layer.size for layer in layers),
        packages,
    )
    _record(directory, image).write_text(json.dumps(asdict(built), indent=2) + "\n")
    return built


def _layer(scratch: Path, name: str, write: Callable[[Path], None]) -> StoredLayer:
    tar = scratch / f"{name}.tar"
    write(tar)
    stored = compress(tar, scratch / f"{name}.gz")
    tar.unlink()
    return stored


def _runtime(base: _Base, whole: Path, image: ImageSpec, tar: Path) -> None:
    difference(base.contents, whole, tar, removed=image.removed)


def _app(image: ImageSpec, tar: Path) -> None:
    app_layer(tar, image.files, image.synthetic)


def _bootstrap(packages: Sequence[str], tar: Path) -> None:
    """Make a root file system with mmdebstrap, from the sources of this machine."""
    program = shutil.which("mmdebstrap")
    if program is None:
        raise NotFound("mmdebstrap is not installed", hint="run scripts/install lab, or install it")
    argv = [program, "--quiet", "--variant=minbase", "--mode=root", "--format=tar"]
    argv += [f"--include={','.join(packages)}"] if packages else []
    # One format at a time: apt reads .sources files and one-line lists, but not both in one stream.
    sources = sorted(_SOURCES.glob("*.sources")) or [
        path for path in (Path("/etc/apt/sources.list"), *sorted(_SOURCES.glob("*.list"))) if path.exists()
    ]
    if not sources:
        raise UsageError("apt has no sources", hint="set up /etc/apt/sources.list.d")
    # The order in which Python writes sets into compiled modules depends on the seed.
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH), "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [*argv, SUITE, tar, "-"],
        input=b"\n".join(path.read_bytes() for path in sources),
        env=environment,
        stderr=subprocess.PIPE,
        timeout=_BUILD_DEADLINE_S,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()[-5:]
        raise UsageError(
            f"mmdebstrap failed for {', '.join(packages) or 'the base system'}: {'; '.join(lines)}"
        )


def _packages(tar: Path) -> tuple[str, ...]:
    with tarfile.open(tar) as source:
        for entry in source:
            file = source.extractfile(entry) if entry.name == _STATUS else None
            if file is not None:
                return tuple(sorted(_versions(file.read().decode())))
    raise IntegrityError(f"{tar} has no {_STATUS}")


def _versions(status: str) -> list[str]:
    out = []
    for paragraph in status.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if "Package" in fields:
            out.append(f"{fields['Package']}={fields['Version']}")
    return out


async def _store(image: ImageSpec, layers: Sequence[StoredLayer], directory: Path) -> Digest:
    layout = OCILayout(directory, create=True)
    blobs = []
    for layer in layers:
        blobs.append(Descriptor(OCI_LAYER_GZIP, layer.digest, layer.stored))
        await layout.push_blob(blobs[-1], partial(_open, layer.path))
    data = canonical_json(_config(image, [str(layer.diff_id) for layer in layers]))
    config = Descriptor(OCI_CONFIG, Digest.of(data), len(data))
    await layout.push_blob(config, partial(io.BytesIO, data))
    return (await layout.push_manifest(build_manifest(config, blobs), OCI_MANIFEST, image.name)).digest


def _config(image: ImageSpec, diff_ids: Sequence[str]) -> Mapping[str, object]:
    settings: dict[str, object] = {"Env": [*_ENV, *image.env], "Cmd": list(image.command)}
    if image.user:
        settings["User"] = image.user
    platform = Platform.host().to_json()
    return {**platform, "config": settings, "rootfs": {"type": "layers", "diff_ids": list(diff_ids)}}


def _definition(image: ImageSpec) -> str:
    facts = asdict(image) | {
        "files": {path: hashlib.sha256(data).hexdigest() for path, data in image.files.items()}
    }
    return str(Digest.of(canonical_json([RECIPE, SUITE, EPOCH, _ENV, facts])))


def _record(directory: Path, image: ImageSpec) -> Path:
    return directory / f"{image.name}.json"


def _open(path: Path) -> BinaryIO:
    return path.open("rb")
