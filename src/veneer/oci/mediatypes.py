"""Media types and annotation keys: OCI image-spec 1.1, Docker schema 2, and our own.

Ours are versioned in their names; a reader that meets an unknown version must refuse it.
"""

__all__ = [
    "ANNOTATION_CREATED",
    "ANNOTATION_INDEX",
    "ANNOTATION_PACK",
    "ANNOTATION_PACK_BLOB",
    "ANNOTATION_PROFILE",
    "ANNOTATION_WORKLOAD",
    "DOCKER_CONFIG",
    "DOCKER_LAYER",
    "DOCKER_LAYER_GZIP",
    "DOCKER_LAYER_ZSTD",
    "DOCKER_MANIFEST",
    "DOCKER_MANIFEST_LIST",
    "EMPTY_JSON",
    "FOREIGN_LAYERS",
    "INDEXES",
    "LAYER_COMPRESSION",
    "MANIFESTS",
    "OCI_CONFIG",
    "OCI_INDEX",
    "OCI_LAYER",
    "OCI_LAYER_GZIP",
    "OCI_LAYER_ZSTD",
    "OCI_MANIFEST",
    "VENEER_INDEX",
    "VENEER_INDEX_ARTIFACT",
    "VENEER_PACK",
    "VENEER_PACK_ARTIFACT",
    "VENEER_PACK_INDEX",
    "VENEER_PROFILE",
    "VENEER_PROFILE_ARTIFACT",
    "VENEER_WINDOWS",
]

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
EMPTY_JSON = "application/vnd.oci.empty.v1+json"

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"

#: Layers whose bytes the registry may not hold; nothing here can fetch them.
FOREIGN_LAYERS = frozenset(
    {
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    }
)

#: Accepted manifest and index types, in the order in which we ask for them.
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEXES = (OCI_INDEX, DOCKER_MANIFEST_LIST)

#: Layer media type -> compression of the tar stream.
LAYER_COMPRESSION = {
    OCI_LAYER: "none",
    OCI_LAYER_GZIP: "gzip",
    OCI_LAYER_ZSTD: "zstd",
    DOCKER_LAYER: "none",
    DOCKER_LAYER_GZIP: "gzip",
    DOCKER_LAYER_ZSTD: "zstd",
}

#: The blob specified in docs/reference/index-format.md.
VENEER_INDEX = "application/vnd.veneer.index.v1"
#: The blob with the windows of a gzip layer, as the index's aux section describes it.
VENEER_WINDOWS = "application/vnd.veneer.windows.v1+zstd"
#: artifactType of the small manifest that refers to an image and carries its index.
VENEER_INDEX_ARTIFACT = "application/vnd.veneer.index.v1"
#: On an image manifest: the JSON text of the index blob's descriptor.
ANNOTATION_INDEX = "dev.veneer.index"

#: The blobs specified in docs/reference/pack-format.md: what is where in a pack, and the pack.
VENEER_PACK_INDEX = "application/vnd.veneer.pack.index.v1"
VENEER_PACK = "application/vnd.veneer.pack.v1+zstd"
#: artifactType of the small manifest that refers to an image and carries a pack.
VENEER_PACK_ARTIFACT = VENEER_PACK_INDEX
#: On an image manifest: the JSON text of an array of descriptors of pack indexes, one a workload.
ANNOTATION_PACK = "dev.veneer.pack"
#: On each of those: the name of its workload.
ANNOTATION_WORKLOAD = "dev.veneer.workload"
#: The blob with the pack's bytes, as ``DIGEST SIZE``, so that it can be asked for together with the index.
ANNOTATION_PACK_BLOB = "dev.veneer.pack.blob"
#: And, if nothing was run for it: ``static``.
ANNOTATION_PROFILE = "dev.veneer.profile"

#: The document specified in docs/reference/profile-format.md.
VENEER_PROFILE = "application/vnd.veneer.profile.v1+json"
#: artifactType of the small manifest that refers to an image and carries profiles.
VENEER_PROFILE_ARTIFACT = VENEER_PROFILE
#: On an artifact: when it was made, as in RFC 3339.
ANNOTATION_CREATED = "org.opencontainers.image.created"
