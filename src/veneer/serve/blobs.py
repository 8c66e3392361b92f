"""Handlers of blobs: range reads, removal, and uploads in all the shapes the API has."""

import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from veneer.serve.api import APIError, digest_parameter
from veneer.serve.message import FileRange, Headers, Piece, Request, Response
from veneer.serve.ranges import ByteRange, Unsatisfiable, parse_range
from veneer.serve.storage import Storage, StoredRepository
from veneer.serve.uploads import Upload, Uploads

__all__ = ["BlobHandlers", "serve_blob"]

_BLOB_TYPE = "application/octet-stream"
_CONTENT_RANGE = re.compile(r"(?:bytes[ =])?([0-9]{1,18})-([0-9]{1,18})(?:/(?:[0-9]+|\*))?")


def serve_blob(request: Request, repository: StoredRepository, reference: str) -> Response:
    """GET or HEAD of one blob, whole or in ranges."""
    digest = digest_parameter(reference)
    total = repository.blob_size(digest)
    if total is None:
        raise APIError("BLOB_UNKNOWN", f"{repository.name} has no blob {digest}")
    tag = f'"{digest}"'
    headers: Headers = (
        ("Docker-Content-Digest", str(digest)),
        ("ETag", tag),
        ("Accept-Ranges", "bytes"),
        ("Cache-Control", "max-age=31536000, immutable"),
    )
    if tag in (request.header("if-none-match") or ""):
        return Response(304, headers)
    condition = request.header("if-range")
    wanted = request.header("range") if request.method == "GET" and condition in (None, tag) else None
    path = repository.blob_path(digest)
    try:
        parts = parse_range(wanted, total)
    except Unsatisfiable:
        raise APIError(
            "SIZE_INVALID",
            f"no byte of {wanted!r} is in a blob of {total} bytes",
            status=416,
            headers=(("Content-Range", f"bytes */{total}"),),
        ) from None
    if parts is None:
        return Response(200, (*headers, ("Content-Type", _BLOB_TYPE)), (FileRange(path, 0, total),))
    if len(parts) > 1:
        return _multipart(headers, path, parts, total)
    content_range = ("Content-Range", parts[0].content_range(total))
    body = FileRange(path, parts[0].offset, parts[0].length)
    return Response(206, (*headers, ("Content-Type", _BLOB_TYPE), content_range), (body,))


def _multipart(headers: Headers, path: Path, parts: Sequence[ByteRange], total: int) -> Response:
    """Several ranges as multipart/byteranges (RFC 9110, section 14.6), in the order asked for."""
    boundary = secrets.token_hex(16)
    pieces: list[Piece] = []
    for part in parts:
        lines = f"--{boundary}", f"Content-Type: {_BLOB_TYPE}", f"Content-Range: {part.content_range(total)}"
        head = "".join(f"\r\n{line}" for line in lines) + "\r\n\r\n"
        pieces += [head.encode(), FileRange(path, part.offset, part.length)]
    pieces.append(f"\r\n--{boundary}--\r\n".encode())
    kind = f"multipart/byteranges; boundary={boundary}"
    return Response(206, (*headers, ("Content-Type", kind)), tuple(pieces))


class BlobHandlers:
    """Blobs and their uploads, over one storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.uploads = Uploads()

    async def blob(self, request: Request, name: str, reference: str) -> Response:
        """``/v2/<name>/blobs/<digest>``."""
        repository = self._storage.existing(name)
        if request.method in ("GET", "HEAD"):
            return serve_blob(request, repository, reference)
        digest = digest_parameter(reference)
        if not await repository.remove_blob(digest):
            raise APIError("BLOB_UNKNOWN", f"{name} has no blob {digest}")
        return Response(202)

    async def begin(self, request: Request, name: str) -> Response:
        """``POST /v2/<name>/blobs/uploads/``: a session, a whole blob, or a mount."""
        repository = self._storage.repository(name)
        if request.param("mount") and request.param("from"):
            digest = digest_parameter(request.param("mount"))
            origin = self._storage.repository(request.param("from"))
            if await repository.mount(digest, origin):
                return _created(name, str(digest))
        whole = request.param("digest")
        if not whole:
            algorithm = request.param("digest-algorithm") or "sha256"
            if algorithm not in ("sha256", "sha512"):
                raise APIError("DIGEST_INVALID", f"unknown digest algorithm {algorithm[:32]!r}")
            return _accepted(await self.uploads.begin(repository, algorithm))
        digest = digest_parameter(whole)
        upload = await self.uploads.begin(repository, digest.algorithm)
        async with upload.lock:
            try:
                await upload.receive(request.body)
                await self.uploads.finish(upload, digest)
            finally:
                self.uploads.drop(upload)
        return _created(name, whole)

    async def session(self, request: Request, name: str, identity: str) -> Response:
        """``/v2/<name>/blobs/uploads/<session>``."""
        upload = self.uploads.find(name, identity)
        if request.method == "GET":
            return Response(204, _progress(upload))
        async with upload.lock:
            self.uploads.find(name, identity)  # it may have ended while this request waited
            if request.method == "DELETE":
                self.uploads.drop(upload)
                return Response(204)
            if request.method == "PATCH":
                await self._append(request, upload)
                return _accepted(upload)
            digest = digest_parameter(request.param("digest"))
            upload.restart(digest.algorithm)
            await self._append(request, upload)
            await self.uploads.finish(upload, digest)
        return _created(name, str(digest))

    async def _append(self, request: Request, upload: Upload) -> None:
        stated = request.header("content-range")
        if stated is not None:
            match = _CONTENT_RANGE.fullmatch(stated.strip())
            if match is None:
                raise APIError("BLOB_UPLOAD_INVALID", f"malformed Content-Range {stated[:80]!r}")
            first, last = int(match[1]), int(match[2])
            if first != upload.offset:
                raise APIError(
                    "BLOB_UPLOAD_INVALID",
                    f"out of order: the upload has {upload.offset} bytes, the chunk starts at {first}",
                    status=416,
                    headers=_progress(upload),
                )
            if request.length is not None and request.length != last - first + 1:
                raise APIError("SIZE_INVALID", "Content-Range and Content-Length disagree")
        try:
            await upload.receive(request.body)
        except OSError as error:
            # Nobody knows how much of the last write is on disk: nothing to resume from.
            self.uploads.drop(upload)
            raise APIError("UNKNOWN", f"cannot store the upload: {error.strerror}") from error


def _progress(upload: Upload) -> Headers:
    return (
        ("Location", f"/v2/{upload.repository.name}/blobs/uploads/{upload.identity}"),
        ("Range", f"0-{max(upload.offset - 1, 0)}"),
        ("Docker-Upload-UUID", upload.identity),
    )


def _accepted(upload: Upload) -> Response:
    return Response(202, _progress(upload))


def _created(name: str, digest: str) -> Response:
    return Response(201, (("Location", f"/v2/{name}/blobs/{digest}"), ("Docker-Content-Digest", digest)))
