"""Store a root file system's tar and a small program as a two-layer gzip image: sample_image.py TAR LAYOUT."""

import hashlib
import io
import json
import sys
import tarfile
import zlib
from functools import partial
from pathlib import Path
from typing import BinaryIO

import trio

from veneer.lab.layers import difference
from veneer.oci.descriptor import Descriptor, Platform
from veneer.oci.digest import Digest
from veneer.oci.manifest import build_manifest
from veneer.oci.mediatypes import OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST
from veneer.source.layout import OCILayout

PROGRAM = b"""import email, json, ssl, sys, urllib.request
print(json.dumps({"hello": "from " + sys.version.split()[0], "modules": len(sys.modules)}))
"""


def program_layer(path: Path) -> None:
    """A second layer: a program, and a whiteout that hides a directory of the first."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("app/hello.py", PROGRAM), ("usr/share/.wh.doc", b"")):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(content), 1_700_000_000, 0o644
            tar.addfile(info, io.BytesIO(content))


def compress(tar: Path, out: Path) -> tuple[Digest, Descriptor]:
    """Gzip a layer (without a time stamp, so that it is reproducible); its diffID and descriptor."""
    plain, stored, size = hashlib.sha256(), hashlib.sha256(), 0
    gzip = zlib.compressobj(6, zlib.DEFLATED, 31)
    with tar.open("rb") as source, out.open("wb") as target:
        while piece := source.read(1 << 20):
            plain.update(piece)
            data = gzip.compress(piece)
            stored.update(data)
            size += target.write(data)
        data = gzip.flush()
        stored.update(data)
        size += target.write(data)
    blob = Descriptor(OCI_LAYER_GZIP, Digest("sha256", stored.hexdigest()), size)
    return Digest("sha256", plain.hexdigest()), blob


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


async def store(tar: Path, layout_path: Path) -> None:
    """Write both layers, the config and the manifest."""
    layout = OCILayout(layout_path, create=True)
    base = tar.with_name("whole.tar")
    difference({}, tar, base)
    program_tar = tar.with_name("program.tar")
    program_layer(program_tar)
    diff_ids, layers = [], []
    for layer in (base, program_tar):
        packed = layer.with_suffix(".gz")
        diff_id, blob = compress(layer, packed)
        await layout.push_blob(blob, partial(_open, packed))
        diff_ids.append(str(diff_id))
        layers.append(blob)
    config = json.dumps(
        {
            **Platform.host().to_json(),
            "config": {"Env": ["PATH=/usr/bin:/bin", "LANG=C.UTF-8"], "Cmd": ["python3", "/app/hello.py"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
    ).encode()
    descriptor = Descriptor(OCI_CONFIG, Digest.of(config), len(config))
    await layout.push_blob(descriptor, partial(io.BytesIO, config))
    await layout.push_manifest(build_manifest(descriptor, tuple(layers)), OCI_MANIFEST, "python")


if __name__ == "__main__":
    trio.run(store, Path(sys.argv[1]), Path(sys.argv[2]))
