"""Indexes that were found out to be wrong: all of a layer had come, and was another; or had no tree in them.

Until a layer is complete nothing can tell what an index makes of it from the layer itself. Once that has been
told, it holds for good: an index is named by its digest, which covers all that it says of its layers.

Notes are small files, one an index, which the cache counts and clears with its other metadata. Not for: what is
damaged on the way or on this disk, which is fetched again.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer.errors import IntegrityError
from veneer.formats.local import read_file, replace_file
from veneer.oci.canonical import canonical_json, parse_json
from veneer.oci.digest import Digest

__all__ = ["Refutation", "Refutations"]

_log = logging.getLogger(__name__)

#: Of a note; the reason is a line.
_MAX_NOTE: Final = 16 << 10


@dataclass(frozen=True, slots=True)
class Refutation:
    """What is known of a wrong index.

    Args:
        manifest: of the image that it was used for.
        layer: that came out wrong; None when the index is wrong in itself.
        reason: how that was seen.
        seen_s: when, in seconds since the epoch.
    """

    manifest: str
    layer: str | None
    reason: str
    seen_s: int

    def error(self, index: Digest) -> IntegrityError:
        """The error of whoever wants to use it."""
        when = time.strftime("%Y-%m-%d", time.gmtime(self.seen_s))
        occasion = f", when all of layer {self.layer} had come" if self.layer else ""
        return IntegrityError(
            f"index {index} was refuted on {when}{occasion}: {self.reason}; "
            "delete it where it comes from and publish a right one (veneer index --push, or veneer convert)",
            hint="veneer cache clear forgets what was refuted",
        )


class Refutations:
    """Those that one cache directory knows. Everything blocks; any thread, and several processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, index: Digest) -> Refutation | None:
        """What is known against an index, or None."""
        path = self._path(index)
        if (data := read_file(path, _MAX_NOTE)) is None:
            return None
        try:
            note = parse_json(data, str(path), limit=_MAX_NOTE)
        except IntegrityError as error:
            _log.warning("cannot use %s: %s", path, error)
            return None
        match note:
            case {
                "manifest": str(manifest),
                "layer": str() | None as layer,
                "reason": str(reason),
                "seen": int(seen_s),
            }:
                return Refutation(manifest, layer, reason, seen_s)
        _log.warning("%s is no note of a refuted index", path)
        return None

    def add(self, index: Digest, manifest: Digest, layer: Digest | None, reason: str) -> None:
        """Note what was found out. What the disk does not take is forgotten with this process."""
        note = {
            "index": str(index),
            "manifest": str(manifest),
            "layer": layer and str(layer),
            "reason": reason[: _MAX_NOTE // 16],
            "seen": int(time.time()),
        }
        try:
            replace_file(self._path(index), canonical_json(note))
        except OSError as error:
            _log.error("cannot note that index %s is wrong: %s", index, error)

    def _path(self, index: Digest) -> Path:
        return self._directory / f"{index.algorithm}-{index.hex}.json"
