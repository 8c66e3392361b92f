"""Handlers of manifests, tags and referrers."""

from veneer.errors import IntegrityError, NotFound, UnsupportedFormat
from veneer.oci.digest import Digest
from veneer.oci.manifest import MAX_MANIFEST_SIZE, Manifest, build_index, parse_manifest
from veneer.oci.mediatypes import FOREIGN_LAYERS, OCI_INDEX
from veneer.oci.reference import TAG
from veneer.serve.api import APIError, digest_parameter, json_response, page
from veneer.serve.message import BodyTooLarge, Headers, Request, Response
from veneer.serve.storage import Storage, StoredRepository

__all__ = ["ManifestHandlers"]


class ManifestHandlers:
    """Manifests over one storage; lists are given in pages of at most ``page_size``."""

    def __init__(self, storage: Storage, page_size: int) -> None:
        self._storage = storage
        self._page_size = page_size

    async def manifest(self, request: Request, name: str, reference: str) -> Response:
        """``/v2/<name>/manifests/<tag or digest>``."""
        if request.method == "PUT":
            return await self._push(request, self._storage.repository(name), reference)
        repository = self._storage.existing(name)
        if request.method == "DELETE":
            return await self._remove(repository, reference)
        _check_reference(reference)
        try:
            found = await repository.layout.manifest(reference)
        except NotFound as error:
            raise APIError("MANIFEST_UNKNOWN", f"{name} has no manifest {reference}") from error
        digest, tag = str(found.descriptor.digest), f'"{found.descriptor.digest}"'
        headers: Headers = (("Docker-Content-Digest", digest), ("ETag", tag))
        if tag in (request.header("if-none-match") or ""):
            return Response(304, headers)
        return Response(200, (("Content-Type", found.descriptor.media_type), *headers), (found.data,))

    async def _push(self, request: Request, repository: StoredRepository, reference: str) -> Response:
        digest = _check_reference(reference)
        try:
            data = await request.read(MAX_MANIFEST_SIZE)
        except BodyTooLarge:
            raise APIError(
                "SIZE_INVALID", f"a manifest has at most {MAX_MANIFEST_SIZE} bytes", status=413
            ) from None
        try:
            parsed = parse_manifest(data, request.header("content-type"))
            if digest is not None:
                digest.check(data, "the manifest")
        except (IntegrityError, UnsupportedFormat) as error:
            code = "MANIFEST_INVALID" if digest is None or digest.of(data) == digest else "DIGEST_INVALID"
            raise APIError(code, error.message) from error
        if isinstance(parsed, Manifest):
            _check_blobs(parsed, repository)
        if digest is not None and digest.algorithm != "sha256":
            raise APIError("UNSUPPORTED", "manifests are stored under sha256 digests", status=400)
        tag = reference if digest is None else ""
        stored = await repository.layout.push_manifest(data, parsed.media_type, tag)
        location = f"/v2/{repository.name}/manifests/{stored.digest}"
        headers: Headers = (("Location", location), ("Docker-Content-Digest", str(stored.digest)))
        if parsed.subject is not None:
            headers = (*headers, ("OCI-Subject", str(parsed.subject.digest)))
        return Response(201, headers)

    async def _remove(self, repository: StoredRepository, reference: str) -> Response:
        digest = _check_reference(reference)
        if digest is None:
            removed = await repository.remove_tag(reference)
        else:
            try:
                await repository.layout.manifest(reference)  # not merely a blob
            except NotFound:
                removed = False
            else:
                removed = await repository.remove_manifest(digest)
        if not removed:
            raise APIError("MANIFEST_UNKNOWN", f"{repository.name} has no manifest {reference}")
        return Response(202)

    async def tags(self, request: Request, name: str) -> Response:
        """``/v2/<name>/tags/list``."""
        tags = await self._storage.existing(name).tags()
        chosen, link = page(
            f"/v2/{name}/tags/list",
            tags,
            str,
            last=request.param("last"),
            number=request.param("n"),
            limit=self._page_size,
        )
        return json_response({"name": name, "tags": list(chosen)}, headers=link)

    async def catalog(self, request: Request) -> Response:
        """``/v2/_catalog``: not in the specification, but in every registry."""
        chosen, link = page(
            "/v2/_catalog",
            await self._storage.names(),
            str,
            last=request.param("last"),
            number=request.param("n"),
            limit=self._page_size,
        )
        return json_response({"repositories": list(chosen)}, headers=link)

    async def referrers(self, request: Request, name: str, subject: str) -> Response:
        """``/v2/<name>/referrers/<digest>``: never 404, for there may be referrers of what is not there."""
        digest = digest_parameter(subject)
        kind = request.param("artifactType")
        try:
            repository = self._storage.existing(name)
        except APIError as error:
            if error.code != "NAME_UNKNOWN":
                raise
            found = []
        else:
            found = await repository.layout.referrers(digest, kind)
        chosen, headers = page(
            f"/v2/{name}/referrers/{digest}",
            sorted(found, key=lambda entry: entry.digest),
            lambda entry: str(entry.digest),
            last=request.param("last"),
            number=request.param("n"),
            limit=self._page_size,
            query=[("artifactType", kind)] if kind else [],
        )
        if kind:
            headers = (*headers, ("OCI-Filters-Applied", "artifactType"))
        return Response(200, (("Content-Type", OCI_INDEX), *headers), (build_index(chosen),))


def _check_reference(reference: str) -> Digest | None:
    """The digest of a reference, or None when it is a valid tag."""
    if ":" in reference:
        return digest_parameter(reference)
    if not TAG.fullmatch(reference):
        raise APIError("MANIFEST_INVALID", f"invalid tag {reference[:128]!r}")
    return None


def _check_blobs(manifest: Manifest, repository: StoredRepository) -> None:
    """A manifest may only be pushed after its blobs, as with the reference implementation."""
    for blob in (manifest.config, *manifest.layers):
        if blob.media_type not in FOREIGN_LAYERS and repository.blob_size(blob.digest) is None:
            raise APIError("MANIFEST_BLOB_UNKNOWN", f"{repository.name} has no blob {blob.digest}")
