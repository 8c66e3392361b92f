"""What users type for an image: ``debian:12``, ``localhost:5000/team/app@sha256:...``, ``oci:DIR:TAG``.

Registry references follow the grammar of the distribution project, with its defaults: ``debian`` is
``docker.io/library/debian:latest``. ``str()`` of a reference is its full form and parses to the same value.

Nothing is asked of any registry here. The only look at the disk is whether a directory with a colon exists.
"""

import os
import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address
from pathlib import Path

from veneer.errors import UsageError
from veneer.oci.digest import Digest

__all__ = ["TAG", "LayoutReference", "RegistryReference", "parse_reference"]

#: A tag of a registry or layout.
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

_DEFAULT_HOST = "docker.io"
_DEFAULT_TAG = "latest"
#: The distribution project's limit on repository names, without the host.
_MAX_REPOSITORY = 255
#: No valid reference is longer: host 255, repository 255, tag 128, digest 135 and separators.
_MAX_REFERENCE = 1_024

_LABEL = r"(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{{1,5}}))?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_IMAGE_ID = re.compile(r"[a-f0-9]{64}")
_DIGEST_SUFFIX = re.compile(r"@([A-Za-z0-9+._-]+:[^/@]*)\Z")
_TRANSPORTS = ("docker-daemon:", "docker-archive:", "oci-archive:", "containers-storage:", "dir:")


@dataclass(frozen=True, slots=True)
class RegistryReference:
    """An image in a registry.

    Args:
        host: ``name[:port]``, as written; ``docker.io`` for Docker Hub.
        repository: path in the registry.
        tag: "" only when there is a digest.
        digest: wins over the tag.
    """

    host: str
    repository: str
    tag: str
    digest: Digest | None = None

    @property
    def reference(self) -> str:
        """What to ask the registry for: the digest, or else the tag."""
        return str(self.digest or self.tag)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"


@dataclass(frozen=True, slots=True)
class LayoutReference:
    """An image in an OCI layout on disk.

    Args:
        path: directory of the layout.
        tag: "" for the only image there is.
        digest: wins over the tag.
    """

    path: Path
    tag: str
    digest: Digest | None = None

    @property
    def reference(self) -> str:
        """What to ask the layout for: the digest, or else the tag, which may be ""."""
        return str(self.digest or self.tag)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        # Only a slash tells a directory named "a:b" from the tag "b" in "a".
        slash = "/" if not tag and any(mark in self.path.name for mark in ":@") else ""
        return f"oci:{self.path}{slash}{tag}{digest}"


def parse_reference(text: str) -> RegistryReference | LayoutReference:
    """Parse what a user typed; raises UsageError with a hint."""
    if text.startswith("oci:"):
        return _parse_layout(text.removeprefix("oci:"))
    if len(text) > _MAX_REFERENCE:
        raise UsageError(f"invalid reference of {len(text)} characters")
    if "://" in text:
        scheme, _, rest = text.partition("://")
        raise UsageError(
            f"invalid reference with scheme {scheme!r}", hint=f"write it as {rest.rpartition('@')[2]}"
        )
    if text.startswith(_TRANSPORTS):
        raise UsageError(
            f"unknown transport in {text!r}", hint="references are HOST/REPOSITORY:TAG or oci:DIR:TAG"
        )
    return _parse_registry(text)


def _parse_registry(text: str) -> RegistryReference:
    rest, at, digest_text = text.partition("@")
    if at and not _DIGEST_SUFFIX.match(at + digest_text):
        # Perhaps user:password@host, so the text must not be repeated in the message.
        raise UsageError(
            "invalid reference: what follows the @ is not a digest",
            hint="write @sha256:...; credentials belong into auth.json or config.json (skopeo login)",
        )
    digest = Digest.parse(digest_text) if at else None
    first, slash, path = rest.partition("/")
    if slash and (any(c in first for c in ".:[") or first == "localhost" or first != first.lower()):
        host = _checked_host(first, text)
    else:
        host, path = _DEFAULT_HOST, rest
    repository, colon, tag = path.partition(":")
    if colon and not TAG.fullmatch(tag):
        raise UsageError(
            f"invalid tag {tag!r} in {text!r}",
            hint="a tag is up to 128 letters, digits, '_', '.' and '-', and begins with none of the last two",
        )
    if host == _DEFAULT_HOST and "/" not in repository:
        if _IMAGE_ID.fullmatch(repository):
            raise UsageError(
                f"{repository} is an image ID", hint="registries know images by REPOSITORY@sha256:..."
            )
        repository = f"library/{repository}" if repository else ""
    _check_repository(repository, text)
    return RegistryReference(host, repository, tag or ("" if digest else _DEFAULT_TAG), digest)


def _checked_host(text: str, reference: str) -> str:
    match = _HOST.fullmatch(text)
    if match is None or len(text) > 255 or (match[2] and not 0 < int(match[2]) < 65536):
        raise UsageError(
            f"invalid registry host {text!r} in {reference!r}",
            hint="write it as HOST, HOST:PORT or [IPV6]:PORT",
        )
    if match[1]:
        try:
            IPv6Address(match[1])
        except AddressValueError as error:
            raise UsageError(f"invalid IPv6 address in {reference!r}: {error}") from error
    return _DEFAULT_HOST if text == "index.docker.io" else text


def _check_repository(repository: str, reference: str) -> None:
    if len(repository) > _MAX_REPOSITORY:
        raise UsageError(f"repository name in {reference!r} has more than {_MAX_REPOSITORY} characters")
    if _REPOSITORY.fullmatch(repository):
        return
    hint = "repository names are lower-case letters and digits, separated by one of / . _ __ -"
    if repository != repository.lower() and _REPOSITORY.fullmatch(repository.lower()):
        hint = f"repository names are lower case: {repository.lower()}"
    raise UsageError(f"invalid reference {reference!r}", hint=hint)


def _parse_layout(text: str) -> LayoutReference:
    """``DIR[:TAG][@DIGEST]``: whatever is an existing directory as a whole is a directory."""
    if "\0" in text:
        raise UsageError("invalid layout reference: a path holds no NUL")
    if os.path.isdir(text):
        return LayoutReference(Path(text), "")
    digest = None
    if match := _DIGEST_SUFFIX.search(text):
        digest = Digest.parse(match[1])
        text = text[: match.start()]
    directory, colon, tag = text.rpartition(":")
    if not colon or "/" in tag or os.path.isdir(text):
        directory, tag = text, ""
    elif not TAG.fullmatch(tag):
        raise UsageError(f"invalid tag {tag!r} in {'oci:' + text!r}", hint="write it as oci:DIR:TAG")
    if not directory:
        raise UsageError("layout reference without a directory", hint="write it as oci:DIR or oci:DIR:TAG")
    return LayoutReference(Path(directory), tag, digest)
