"""Indexes as plain JSON values, for people and scripts that look into one.

Everything is there, nothing is abbreviated, and the order is that of the index. Bytes that are not UTF-8 are
given in base64 as well (``path_b64`` besides a ``path`` with replacement characters), so a dump loses nothing.
"""

import stat
from base64 import b64encode
from collections.abc import Iterator

from veneer.index.model import (
    IMPLICIT_DIR,
    LINK,
    WHITEOUT,
    Device,
    ImageIndex,
    LayerIndex,
    LayerTree,
    MetadataPolicy,
    Xattrs,
)
from veneer.oci.canonical import Json

__all__ = ["dump_device", "dump_image", "dump_layer", "dump_policy"]

#: Type bits of a mode -> what they are called here.
_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    IMPLICIT_DIR: "implicit directory",
    LINK: "link",
    WHITEOUT: "whiteout",
}


def dump_image(index: ImageIndex) -> dict[str, Json]:
    """The merged image: its policy, its devices and every name in it.

    Names of one inode have the same ``inode``, which means nothing else.
    """
    return {
        "policy": dump_policy(index.policy),
        "devices": [dump_device(device) for device in index.devices],
        "entries": [_entry(index, path, node) for path, node in index.walk()],
    }


def dump_layer(layer: LayerIndex) -> dict[str, Json]:
    """One layer as it is in the index, whiteouts and links to lower layers included."""
    return {"device": dump_device(layer.device), "rows": list(_rows(layer.tree))}


def dump_policy(policy: MetadataPolicy) -> dict[str, Json]:
    """What was kept of the metadata."""
    return {"devices": policy.devices, "dropped": dict(policy.dropped)}


def dump_device(device: Device) -> dict[str, Json]:
    """One layer's data: its blob and all its spans."""
    windows: dict[str, Json] = {} if device.windows is None else {"windows": dump_device(device.windows)}
    return {
        "key": str(device.key),
        "blob": device.blob.to_json(),
        "diff_id": str(device.diff_id),
        "size": device.spans.size,
        "spans": [
            {
                "offset": span.offset,
                "length": span.length,
                "stored_offset": span.stored_offset,
                "stored_length": span.stored_length,
                "codec": span.codec.name,
                "digest": f"sha256:{span.digest.hex()}",
                **({"carry": span.carry} if span.carry else {}),
            }
            for span in device.spans
        ],
        **windows,
    }


def _entry(index: ImageIndex, path: bytes, node: int) -> dict[str, Json]:
    mode = index.mode[node]
    entry: dict[str, Json] = {
        **_text("path", path),
        "inode": node,
        **_attributes(mode, index.uid[node], index.gid[node], index.mtime_ns[node]),
        "nlink": index.nlink[node],
    }
    if stat.S_ISREG(mode):
        entry["size"] = index.size[node]
        entry["extents"] = [dict(extent._asdict()) for extent in index.extents(node)]
    return entry | _facts(index, node)


def _rows(tree: LayerTree) -> Iterator[dict[str, Json]]:
    paths = [b""] * len(tree)
    for row, mode in enumerate(tree.mode):
        first = tree.first_child[row]
        prefix = paths[row] + b"/" if row else b""
        for child in range(first, first + tree.child_count[row]):
            paths[child] = prefix + tree.names[child]
        out: dict[str, Json] = {"row": row, **_text("path", paths[row])}
        if stat.S_IFMT(mode) in (LINK, WHITEOUT):
            out["type"] = _TYPES[stat.S_IFMT(mode)]
        else:
            out |= _attributes(mode, tree.uid[row], tree.gid[row], tree.mtime_ns[row])
        if stat.S_ISREG(mode):
            out |= {"size": tree.size[row], "data": tree.data[row]}
            if (segments := tree.segments.get(row)) is not None:
                out["segments"] = [list(segment) for segment in segments]
        if row in tree.opaque:
            out["opaque"] = True
        if (target := tree.links.get(row)) is not None:
            out["link"] = target
        if (path := tree.far_links.get(row)) is not None:
            out |= _text("far_link", path)
        yield out | _facts(tree, row)


def _attributes(mode: int, uid: int, gid: int, mtime_ns: int) -> dict[str, Json]:
    return {
        "type": _TYPES[stat.S_IFMT(mode)],
        "mode": f"{stat.S_IMODE(mode):04o}",
        "uid": uid,
        "gid": gid,
        "mtime_ns": mtime_ns,
    }


def _facts(tree: LayerTree | ImageIndex, row: int) -> dict[str, Json]:
    """Facts that layers and images keep in the same way."""
    out: dict[str, Json] = {}
    if (target := tree.targets.get(row)) is not None:
        out |= _text("target", target)
    if (rdev := tree.rdevs.get(row)) is not None:
        out["rdev"] = list(rdev)
    if (xattrs := tree.xattrs.get(row)) is not None:
        out["xattrs"] = _xattrs(xattrs)
    return out


def _xattrs(xattrs: Xattrs) -> list[Json]:
    return [{**_text("name", name), **_text("value", value)} for name, value in xattrs]


def _text(key: str, value: bytes) -> dict[str, Json]:
    try:
        return {key: value.decode()}
    except UnicodeDecodeError:
        return {key: value.decode(errors="replace"), f"{key}_b64": b64encode(value).decode()}
