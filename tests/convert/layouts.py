"""Reading and changing OCI layouts in tests, without the code under test."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAG = "org.opencontainers.image.ref.name"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True)
class Layout:
    """One layout on disk."""

    path: Path

    def ref(self, tag: str) -> str:
        return f"oci:{self.path}:{tag}"

    def file(self, digest: str) -> Path:
        return self.path / "blobs" / digest.replace(":", "/")

    def document(self, digest: str) -> Any:
        return json.loads(self.file(digest).read_bytes())

    def tags(self) -> dict[str, Any]:
        """Tag -> descriptor."""
        path = self.path / "index.json"
        entries = json.loads(path.read_text())["manifests"] if path.exists() else []
        return {entry["annotations"][TAG]: entry for entry in entries if TAG in entry.get("annotations", {})}

    def manifest(self, tag: str) -> Any:
        return self.document(self.tags()[tag]["digest"])

    def store(self, media_type: str, data: bytes) -> dict[str, Any]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.file(digest).parent.mkdir(parents=True, exist_ok=True)
        self.file(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def tag(self, tag: str, descriptor: dict[str, Any]) -> None:
        path = self.path / "index.json"
        index = json.loads(path.read_text())
        others = [entry for entry in index["manifests"] if entry.get("annotations", {}).get(TAG) != tag]
        index["manifests"] = [*others, {**descriptor, "annotations": {TAG: tag}}]
        path.write_text(json.dumps(index))

    def change(self, tag: str, new_tag: str, **members: Any) -> None:
        """Tag a manifest that differs in some members."""
        old = self.tags()[tag]
        manifest = {**self.document(old["digest"]), **members}
        media_type = manifest.get("mediaType", old["mediaType"])
        self.tag(new_tag, self.store(media_type, json.dumps(manifest).encode()))

    def flip(self, digest: str, offset: int) -> None:
        """Damage a blob."""
        data = bytearray(self.file(digest).read_bytes())
        data[offset] ^= 1
        self.file(digest).write_bytes(data)
