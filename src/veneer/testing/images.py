"""Random images for property tests, and images written to OCI layouts.

The layers are legal, and nasty: names in arbitrary bytes, everything that can change type from one layer to the
next, whiteouts beside entries of the same name, hard links whose first name is replaced, files of gigabytes
that are nearly all holes, every header format.
"""

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import zstandard
from hypothesis import strategies as st

from veneer.testing.tars import TarItem, item_bytes, opaque, tar, whiteout

__all__ = ["Layer", "random_layers", "write_image"]

Layer = tuple[TarItem, ...]
_Path = tuple[bytes, ...]

_SECOND: Final = 1_000_000_000
#: From the first time that ext4 can store with a fraction (Linux drops it in the very first second) to the last
#: one that 64 bits of nanoseconds can.
_FIRST_TIME: Final = -(1 << 31) * _SECOND + _SECOND
_LAST_TIME: Final = (1 << 63) - 1
_MAX_ID: Final = (1 << 32) - 2

#: Few, so that layers meet; and each a trap for somebody.
_NAMES: Final = (
    b"a",
    b"b",
    b"etc",
    b"a b",
    b"-rf",
    b"..a",
    b"wh.a",
    b"a.wh.b",
    b"new\nline",
    b"\xc3\xa9",
    b"\xff\xfe",
    b"%41",
    b"n" * 255,
)
#: As setcap writes it (version 2: cap_net_raw, permitted and effective); the kernel checks the form.
_CAPABILITY: Final = bytes.fromhex("0100000200200000000000000000000000000000")
_XATTRS: Final = (
    (b"user.empty", b""),
    (b"user.text", b"value"),
    (b"user.bytes", b"\x00\xff=\n"),
    (b"trusted.veneer", b"1"),
    (b"trusted.overlay.opaque", b"y"),
    (b"user.overlay.redirect", b"/etc"),
)
_ON_FILES: Final = (b"security.capability", _CAPABILITY)


def _names() -> st.SearchStrategy[bytes]:
    return st.sampled_from(_NAMES) | st.binary(min_size=1, max_size=12).map(_legal)


def _legal(raw: bytes) -> bytes:
    name = raw.replace(b"/", b"_").replace(b"\0", b"_")
    return b"_" + name if name in (b".", b"..") or name.startswith(b".wh.") else name


class _State:
    """What a layer has so far, so that the next entry is legal."""

    def __init__(self) -> None:
        #: Path -> whether it is a directory; implied ones included.
        self.paths: dict[_Path, bool] = {}

    def blocked(self, path: _Path) -> bool:
        """Whether a non-directory of this layer is on the way to ``path``."""
        return any(self.paths.get(path[:depth]) is False for depth in range(1, len(path)))

    def put(self, path: _Path, *, directory: bool) -> None:
        if not directory:
            for other in [other for other in self.paths if other[: len(path)] == path]:
                del self.paths[other]
        self.imply(path)
        self.paths[path] = directory

    def imply(self, path: _Path) -> None:
        for depth in range(1, len(path)):
            self.paths[path[:depth]] = True

    def files(self) -> list[_Path]:
        return sorted(path for path, directory in self.paths.items() if not directory)


@st.composite
def _paths(draw: st.DrawFn, state: _State, below: Sequence[_Path]) -> _Path:
    """A place for an entry: often one that is there already, in this layer or below; sometimes a deep one."""
    known = sorted({*state.paths, *below, ()})
    start = draw(st.sampled_from(known))
    more = tuple(draw(st.lists(_names(), max_size=2)))
    if draw(st.integers(0, 30)) == 30:
        more += (draw(_names()),) * draw(st.integers(10, 12))
    path = start + more if start + more else (draw(_names()),)
    # With the directory that tests unpack to, it has to stay below PATH_MAX.
    return path if len(b"/".join(path)) < 3600 and not state.blocked(path) else (draw(_names()),)


def _spelled(draw: st.DrawFn, path: _Path, kind: str) -> bytes:
    text = draw(st.sampled_from((b"", b"./", b"/", b".//"))) + b"/".join(path)
    return text + b"/" if kind == "dir" and draw(st.booleans()) else text


@st.composite
def _pieces(draw: st.DrawFn) -> tuple[tuple[tuple[int, bytes], ...], int]:
    """Data and size of a sparse file, now and then of more than 4 GiB."""
    unit = draw(st.sampled_from((1, 512, 4096, 1 << 20, 1 << 31)))
    at, out = 0, []
    for _ in range(draw(st.integers(0, 8))):
        at += draw(st.integers(0, 4)) * unit
        data = draw(st.sampled_from((b"x", b"\0", b"ab" * 700, bytes(range(256)) * 20)))
        out.append((at, data))
        at += len(data)
    return tuple(out), at + draw(st.integers(0, 3)) * unit


@st.composite
def _contents(draw: st.DrawFn, item: TarItem) -> TarItem:
    if draw(st.integers(0, 3)):
        return replace(item, content=draw(st.binary(max_size=40)) * draw(st.sampled_from((1, 50))))
    pieces, size = draw(_pieces())
    # A file that is not sparse after all is still a sparse entry; an empty one is not.
    return replace(item, pieces=pieces, size=size, sparse=draw(st.sampled_from(("0.0", "0.1", "1.0"))))


@st.composite
def _items(draw: st.DrawFn, path: _Path, state: _State) -> TarItem:
    links = [other for other in state.files() if other[: len(path)] != path]
    kinds = ["file", "file", "symlink", "fifo", "char", "block"] + ["link"] * (2 if links else 0)
    if state.paths.get(path) is not False:
        # Unpackers disagree on what is below a directory that takes the place of a file of its own layer.
        kinds += ["dir", "dir"]
    kind = draw(st.sampled_from(kinds))
    item = TarItem(
        _spelled(draw, path, kind),
        kind,
        mode=draw(st.sampled_from((0o644, 0o755, 0, 0o4755, 0o2750, 0o1777, 0o7777))),
        uid=draw(st.sampled_from((0, 1, 1000, 65534, 1 << 21, _MAX_ID))),
        gid=draw(st.sampled_from((0, 5, 100_000, _MAX_ID))),
        mtime_ns=draw(st.sampled_from((0, 1, 1_700_000_000 * _SECOND)) | st.integers(_FIRST_TIME, _LAST_TIME)),
    )
    xattrs = draw(st.lists(st.sampled_from(_XATTRS), unique=True, max_size=2)) if draw(st.booleans()) else []
    if kind == "file":
        item = draw(_contents(item))
        xattrs += [_ON_FILES] * draw(st.booleans())
    elif kind == "symlink":
        item = replace(item, link=draw(st.sampled_from((b"a", b"/etc", b"../..", b"\xff", b"t" * 300))))
    elif kind == "link":
        item = replace(item, link=_spelled(draw, draw(st.sampled_from(links)), kind))
    elif kind in ("char", "block"):
        item = replace(item, rdev=draw(st.sampled_from(((0, 0), (1, 3), (259, 70_000)))))
    return _formed(
        replace(item, xattrs=tuple(xattrs)), draw(st.sampled_from(("pax", "pax", "gnu", "ustar", "v7")))
    )


def _formed(item: TarItem, form: str) -> TarItem:
    """The item in the wanted form if that can say it, with the attributes that it has no room for left away."""
    if form == "pax":
        return item
    other = replace(item, form=form, xattrs=(), mtime_ns=item.mtime_ns // _SECOND * _SECOND, sparse="old")
    try:
        item_bytes(other)
    except ValueError:
        return item
    return other


@st.composite
def _layers(draw: st.DrawFn, below: Sequence[_Path], most: int) -> tuple[Layer, list[_Path]]:
    state = _State()
    items: list[TarItem] = []
    if draw(st.booleans()):
        items.append(TarItem(b"./", "dir", mode=0o711, uid=7, gid=8, mtime_ns=draw(st.integers(0, 1 << 60))))
    for _ in range(draw(st.integers(0, most))):
        path = draw(_paths(state, below))
        what = draw(st.integers(0, 9))
        if what == 0:
            items.append(whiteout(b"/".join(path)))
            state.imply(path)
        elif what == 1 and state.paths.get(path) is not False:
            items.append(opaque(b"/".join(path)))
            state.put(path, directory=True)
        else:
            item = draw(_items(path, state))
            items.append(item)
            state.put(path, directory=item.kind == "dir")
    return tuple(items), sorted(state.paths)


@st.composite
def random_layers(draw: st.DrawFn, *, most_layers: int = 4, most_items: int = 14) -> list[Layer]:
    """One to ``most_layers`` layers, lowest first, that any unpacker accepts."""
    layers: list[Layer] = []
    below: set[_Path] = set()
    for _ in range(draw(st.integers(1, most_layers))):
        layer, paths = draw(_layers(sorted(below), most_items))
        layers.append(layer)
        below.update(paths)
    return layers


_COMPRESSIONS: Final = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}


def write_image(
    layers: Sequence[Layer | bytes],
    layout_path: Path,
    tag: str,
    compression: str = "gzip",
    config: Mapping[str, object] | None = None,
) -> None:
    """Store an image in an OCI layout, which is made if it is not there; an image with the same tag goes.

    Args:
        layers: lowest first, as items or as whole tars.
        layout_path: directory of the layout.
        tag: its ``org.opencontainers.image.ref.name``.
        compression: gzip, zstd or none.
        config: the ``config`` object of the image config (Cmd, Env and so on).
    """
    (layout_path / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    (layout_path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    media_type = f"application/vnd.oci.image.layer.v1.tar{_COMPRESSIONS[compression]}"
    diff_ids, descriptors = [], []
    for layer in layers:
        plain = layer if isinstance(layer, bytes) else tar(layer)
        diff_ids.append(f"sha256:{hashlib.sha256(plain).hexdigest()}")
        descriptors.append(_store(layout_path, media_type, _compress(plain, compression)))
    image_config = {
        "architecture": "amd64",
        "os": "linux",
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created_by": "veneer.testing"} for _ in layers],
    }
    manifest_type = "application/vnd.oci.image.manifest.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": _store(layout_path, "application/vnd.oci.image.config.v1+json", _json(image_config)),
        "layers": descriptors,
    }
    name = "org.opencontainers.image.ref.name"
    described = {**_store(layout_path, manifest_type, _json(manifest)), "annotations": {name: tag}}
    index = layout_path / "index.json"
    others = json.loads(index.read_text())["manifests"] if index.exists() else []
    others = [other for other in others if other.get("annotations", {}).get(name) != tag]
    index.write_bytes(_json({"schemaVersion": 2, "manifests": [*others, described]}))


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _compress(plain: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(plain, 6, mtime=0)
    return zstandard.ZstdCompressor().compress(plain) if compression == "zstd" else plain


def _store(layout_path: Path, media_type: str, data: bytes) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    (layout_path / "blobs/sha256" / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
