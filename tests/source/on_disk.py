"""Looking at the files of a layout, and changing them behind its back."""

import json
from pathlib import Path
from typing import Any

from veneer.oci.digest import Digest

#: The annotation that holds a tag.
REF_NAME = "org.opencontainers.image.ref.name"


def exists(path: Path) -> bool:
    """Whether anything is there."""
    return path.exists()


def files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}


def index_of(path: Path) -> Any:
    return json.loads((path / "index.json").read_bytes())


def edit_index(path: Path, *entries: dict[str, Any], **members: Any) -> None:
    document = index_of(path) | members
    document["manifests"] += entries
    (path / "index.json").write_text(json.dumps(document))


def blob_file(path: Path, digest: Digest) -> Path:
    return path / "blobs" / digest.algorithm / digest.hex
