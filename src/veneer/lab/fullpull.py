"""The honest rival: pull all of an image in parallel ranges, unpack it as it comes, and run it on an overlay.

``python -m veneer.lab.fullpull REFERENCE BUNDLE OVERLAY`` does what a good client that is not lazy could do:
all layers at once, several connections, checked as they arrive, decompressed by ISA-L, unpacked by bsdtar
into a directory each, which overlayfs stacks. The bundle's ``config.json`` is ready. Only gzip layers on a
registry without authentication: it is a subject of the lab, and no part of veneer.
"""

import hashlib
import http.client
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from isal import isal_zlib

__all__ = ["main"]

_CONNECTIONS = 6
#: The prototypes' ranges of other parallel pullers are 8 or 16 MiB; more at a time would only start later.
_RANGE = 4 << 20
#: Ranges under way of one layer: what is fetched and not yet unpacked stays below 64 MiB.
_AHEAD = 16
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_WHITEOUT = ".wh."


class _Client:
    """Requests to one registry, each thread with a connection of its own."""

    def __init__(self, host: str, repository: str) -> None:
        self._host = host
        self._base = f"/v2/{repository}"
        self._own = threading.local()

    def get(self, path: str, headers: dict[str, str]) -> bytes:
        """The body of one answer, which must be the whole or the part that was asked for."""
        connection = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._own.connection = http.client.HTTPConnection(self._host, timeout=60)
        connection.request("GET", f"{self._base}/{path}", headers=headers)
        with connection.getresponse() as answer:
            if answer.status != (206 if "Range" in headers else 200):
                raise SystemExit(f"{path}: HTTP status {answer.status}")
            return bytes(answer.read())

    def ranges(self, pool: ThreadPoolExecutor, digest: str, size: int) -> Iterator[bytes]:
        """A blob in pieces, several of them under way."""
        pending: queue.SimpleQueue[Future[bytes]] = queue.SimpleQueue()
        offsets = iter(range(0, size, _RANGE))

        def ask() -> None:
            for offset in offsets:
                last = min(offset + _RANGE, size) - 1
                pending.put(pool.submit(self.get, f"blobs/{digest}", {"Range": f"bytes={offset}-{last}"}))
                return

        for _ in range(_AHEAD):
            ask()
        for _ in range(0, size, _RANGE):
            piece = pending.get().result()
            ask()
            yield piece


def _unpack(client: _Client, pool: ThreadPoolExecutor, layer: dict[str, Any], directory: Path) -> None:
    digest = hashlib.sha256()
    inflate = isal_zlib.decompressobj(31)
    argv = ["bsdtar", "-xpf", "-", "--numeric-owner", "-C", os.fspath(directory)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as tar:
        assert tar.stdin is not None
        for piece in client.ranges(pool, layer["digest"], layer["size"]):
            digest.update(piece)
            tar.stdin.write(inflate.decompress(piece))
        tar.stdin.close()
        if tar.wait():
            raise SystemExit(f"bsdtar failed with status {tar.returncode}")
    if layer["digest"] != f"sha256:{digest.hexdigest()}":
        raise SystemExit(f"{layer['digest']} is damaged")


def _hide(directory: Path) -> None:
    """Whiteouts of a layer as overlayfs has them."""
    for parent, _, names in os.walk(directory):
        for name in names:
            if name.startswith(_WHITEOUT):
                os.unlink(os.path.join(parent, name))
                os.mknod(os.path.join(parent, name.removeprefix(_WHITEOUT)), 0o020000, 0)


def main(reference: str, bundle: str, overlay: str) -> None:
    """Pull, unpack, mount, and become runc."""
    host, _, rest = reference.partition("/")
    repository, _, tag = rest.rpartition(":")
    client = _Client(host, repository)
    manifest = json.loads(client.get(f"manifests/{tag}", {"Accept": _MANIFEST}))
    layers = manifest["layers"]
    directories = [Path(overlay) / str(number) for number in range(len(layers))]
    for directory in (*directories, Path(overlay) / "upper", Path(overlay) / "work"):
        directory.mkdir()
    with ThreadPoolExecutor(_CONNECTIONS) as pool, ThreadPoolExecutor(len(layers)) as unpackers:
        jobs = [
            unpackers.submit(_unpack, client, pool, layer, directory)
            for layer, directory in zip(layers, directories, strict=True)
        ]
        for job in jobs:
            job.result()
    for directory in directories[1:]:
        _hide(directory)
    lower = ":".join(os.fspath(directory) for directory in reversed(directories))
    options = f"lowerdir={lower},upperdir={overlay}/upper,workdir={overlay}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, f"{bundle}/rootfs"], check=True)
    os.execvp("runc", ["runc", "run", "--bundle", bundle, "lab-run"])


if __name__ == "__main__":
    main(*sys.argv[1:])
