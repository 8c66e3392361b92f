"""Write the golden vectors: ``python -m tests.index.vectors.make`` from the root of the repository.

An image of three layers that has every fact the format can say. Sections are written plain, in hexadecimal, and
must stay the same for ever; the packed artifact depends on the zstd version and must only decode to the same.
"""

import json
import stat
from array import array
from pathlib import Path

from veneer.index.dump import dump_image, dump_layer
from veneer.index.merge import merge
from veneer.index.model import (
    DEFLATE,
    IMPLICIT_DIR,
    LINK,
    WHITEOUT,
    WINDOW_SIZE,
    Codec,
    Device,
    LayerIndex,
    LayerTree,
    MetadataPolicy,
    SpanTable,
    pack_carry,
)
from veneer.index.wire import (
    decode_spans,
    encode_policy,
    encode_spans,
    encode_tree,
    header_length,
    pack_index,
)
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.mediatypes import OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, VENEER_WINDOWS

DIRECTORY = Path(__file__).parent
POLICY = MetadataPolicy("keep", {"time out of range": 1, "xattr": 300})
#: 2023-11-14T22:13:20Z
TIME = 1_700_000_000 * 10**9


def column(values: list[int]) -> "array[int]":
    return array("q", values)


def lower_tree() -> LayerTree:
    """``/bin/sh``, a second name of it, a setuid file, a sparse file, a symlink, devices and a fifo."""
    file, directory = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755
    return LayerTree(
        names=[
            b"",
            b"bin",
            b"dev",
            b"lib",
            b"empty",
            b"sh",
            b"sh2",
            b"su",
            b"null",
            b"pipe",
            b"sda",
            b"\xff.so",
        ],
        mode=column(
            [
                directory,
                directory,
                IMPLICIT_DIR | 0o755,
                directory,
                file,
                stat.S_IFREG | 0o755,
                LINK,
                stat.S_IFREG | 0o4755,
                stat.S_IFCHR | 0o666,
                stat.S_IFIFO | 0o600,
                stat.S_IFBLK | 0o660,
                file,
            ]
        ),
        uid=column([0, 0, 0, 0, 1000, 0, 0, 0, 0, 0, 0, 70000]),
        gid=column([0, 0, 0, 0, 1000, 0, 0, 0, 0, 0, 6, 70000]),
        mtime_ns=column([TIME, TIME, 0, TIME + 5, TIME, TIME, 0, -1, TIME, TIME, TIME, TIME]),
        size=column([0, 0, 0, 0, 0, 100_000, 0, 513, 0, 0, 0, 1 << 33]),
        data=column([0, 0, 0, 0, 0, 2048, 0, 103_424, 0, 0, 0, 512]),
        first_child=column([1, 4, 8, 11, 0, 0, 0, 0, 0, 0, 0, 0]),
        child_count=column([3, 4, 3, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        links={6: 5},
        rdevs={8: (1, 3), 10: (8, 1 << 10)},
        xattrs={
            5: ((b"security.capability", bytes(range(20))), (b"user.note", b"")),
            7: ((b"user.note", b"second"),),
            11: ((b"security.capability", bytes(range(20))), (b"user.note", b"")),
        },
        segments={11: ((4096, 512), (1 << 32, 1))},
    )


def upper_tree() -> LayerTree:
    """Hides ``/dev/sda``, replaces all of ``/bin``, and gives ``/lib/\\xff.so`` a second name and a symlink."""
    directory = stat.S_IFDIR | 0o755
    return LayerTree(
        names=[b"", b"bin", b"dev", b"so", b"so.1", b"sh", b"sda"],
        mode=column(
            [
                IMPLICIT_DIR | 0o755,
                directory,
                IMPLICIT_DIR | 0o755,
                stat.S_IFLNK | 0o777,
                LINK,
                stat.S_IFREG | 0o755,
                WHITEOUT,
            ]
        ),
        uid=column([0] * 7),
        gid=column([0] * 7),
        mtime_ns=column([0, TIME, 0, TIME, 0, TIME, 0]),
        size=column([0, 0, 0, 0, 0, 3, 0]),
        data=column([0, 0, 0, 0, 0, 1024, 0]),
        first_child=column([1, 5, 6, 0, 0, 0, 0]),
        child_count=column([4, 1, 1, 0, 0, 0, 0]),
        targets={3: b"lib/\xff.so"},
        far_links={4: b"lib/\xff.so"},
        opaque=frozenset({1}),
    )


def gzip_tree() -> LayerTree:
    """One file, ``/app``."""
    return LayerTree(
        names=[b"", b"app"],
        mode=column([IMPLICIT_DIR | 0o755, stat.S_IFREG | 0o644]),
        uid=column([0, 1000]),
        gid=column([0, 1000]),
        mtime_ns=column([0, TIME]),
        size=column([0, 3_000_000]),
        data=column([0, 512]),
        first_child=column([1, 0]),
        child_count=column([1, 0]),
    )


def windows() -> Device:
    """Those of a layer of three spans: two in one frame, one in another."""
    spans = SpanTable(
        starts=column([0, 2 * WINDOW_SIZE, 3 * WINDOW_SIZE]),
        stored_offsets=column([0, 4000]),
        stored_lengths=column([4000, 1500]),
        digests=b"".join(Digest.of(b"windows %d" % number).raw for number in range(2)),
        codecs=(Codec("zstd"),),
    )
    blob = Descriptor(VENEER_WINDOWS, Digest.of(b"windows blob"), 5500)
    return decode_spans(encode_spans(blob, Digest.of(b"windows"), spans))


def gzip_layer() -> LayerIndex:
    """A gzip layer as it is: its spans begin after the header, inside of a byte, and at a byte boundary."""
    spans = SpanTable(
        starts=column([0, 1_048_576, 2_097_152, 3_001_856]),
        stored_offsets=column([10, 400_000, 800_000]),
        stored_lengths=column([399_990, 400_000, 380_000]),
        digests=b"".join(Digest.of(b"stretch %d" % number).raw for number in range(3)),
        codecs=(Codec(DEFLATE, parameters=windows().key.raw),),
        carries=bytes([0, pack_carry(3, 0b101), 0]),
    )
    blob = Descriptor(OCI_LAYER_GZIP, Digest.of(b"gzip"), 1_180_000)
    data = encode_spans(blob, Digest.of(b"tar"), spans, windows())
    return LayerIndex(gzip_tree(), decode_spans(data, windows()))


def layers() -> list[LayerIndex]:
    """All layers; the lowest one's blob has a sha512 digest and a gap between its spans."""
    lower_spans = SpanTable(
        starts=column([0, 1024, 66_560, 110_592]),
        stored_offsets=column([0, 300, 20_400]),
        stored_lengths=column([300, 20_000, 44_032]),
        digests=b"".join(Digest.of(b"span %d" % number).raw for number in range(3)),
        codecs=(Codec("zstd"), Codec("raw")),
        codec_of=bytes([0, 0, 1]),
    )
    upper_spans = SpanTable(
        starts=column([0, 4096]),
        stored_offsets=column([0]),
        stored_lengths=column([4096]),
        digests=Digest.of(b"span").raw,
        codecs=(Codec("raw"),),
    )
    blobs = [
        Descriptor(OCI_LAYER_ZSTD, Digest.of(b"lower blob", "sha512"), 64_500),
        Descriptor(OCI_LAYER, Digest.of(b"upper"), 4096),
    ]
    sections = [
        encode_spans(blobs[0], Digest.of(b"lower"), lower_spans),
        encode_spans(blobs[1], Digest.of(b"upper"), upper_spans),
    ]
    trees = [lower_tree(), upper_tree()]
    native = [LayerIndex(tree, decode_spans(data)) for tree, data in zip(trees, sections, strict=True)]
    return [*native, gzip_layer()]


def vectors() -> dict[str, bytes]:
    """File name -> plain section."""
    out = {"policy": encode_policy(POLICY)}
    for name, layer in zip(("lower", "upper", "gzip"), layers(), strict=True):
        device = layer.device
        out[f"{name}-tree"] = encode_tree(layer.tree)
        out[f"{name}-spans"] = encode_spans(device.blob, device.diff_id, device.spans, device.windows)
    out["gzip-aux"] = encode_spans(windows().blob, windows().diff_id, windows().spans)
    return out


def documents() -> dict[str, object]:
    """File name -> what the artifact says, as JSON."""
    every = layers()
    return {"layers": [dump_layer(layer) for layer in every], "image": dump_image(merge(every, POLICY))}


def to_hex(data: bytes) -> str:
    """Lines of 32 bytes."""
    return "".join(f"{data[start : start + 32].hex()}\n" for start in range(0, len(data), 32))


def main() -> None:
    for name, data in vectors().items():
        (DIRECTORY / f"{name}.hex").write_text(to_hex(data))
    for name, document in documents().items():
        (DIRECTORY / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    artifact = pack_index(layers(), POLICY)
    (DIRECTORY / "artifact.hex").write_text(to_hex(artifact))
    print(f"{len(artifact)} bytes, {header_length(len(layers()))} of them header")


if __name__ == "__main__":
    main()
