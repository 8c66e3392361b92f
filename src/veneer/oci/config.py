"""Image configs: what to run and what the layers must unpack to (OCI image-spec, config.md).

Docker's ``application/vnd.docker.container.image.v1+json`` has the same members with the same meaning, so one
parser reads both. History, creation time and whatever else a builder noted are left alone in ``raw``.

Strings that end up in ``execve`` or in a path hold no NUL.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from veneer.errors import IntegrityError, UsageError
from veneer.oci.canonical import Json, parse_json
from veneer.oci.descriptor import Platform, string_map
from veneer.oci.digest import Digest
from veneer.oci.manifest import MAX_LAYERS
from veneer.oci.mediatypes import DOCKER_CONFIG, OCI_CONFIG

__all__ = ["IMAGE_CONFIGS", "MAX_CONFIG_SIZE", "ImageConfig"]

#: Config media types that make a manifest an image; with any other it is an artifact.
IMAGE_CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})
#: The largest that other clients read (containers/image: 4 MiB); long histories reach some 100 KiB.
MAX_CONFIG_SIZE = 4 << 20

_PLATFORM = ("os", "architecture", "variant")


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The config of one image, checked.

    Args:
        platform: what it runs on; the variant may be "".
        diff_ids: digests of the uncompressed layers, lowest first, one for each layer of the manifest.
        env: ``NAME=value`` in order.
        entrypoint: () when there is none.
        cmd: () when there is none.
        working_dir: "" for the root directory.
        user: ``user[:group]`` by name or number; "" for root.
        stop_signal: "" for the default.
        exposed_ports: such as ``80/tcp``, sorted.
        volumes: paths, sorted.
        raw: the bytes that its digest is of.
    """

    platform: Platform
    diff_ids: tuple[Digest, ...]
    env: tuple[str, ...]
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    working_dir: str
    user: str
    labels: Mapping[str, str]
    stop_signal: str
    exposed_ports: tuple[str, ...]
    volumes: tuple[str, ...]
    raw: bytes

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse a config; raises IntegrityError for anything that is not one."""
        document = _object(parse_json(data, "image config", limit=MAX_CONFIG_SIZE), "image config")
        platform = Platform.from_json(
            {key: document[key] for key in _PLATFORM if document.get(key) is not None}
        )
        if platform is None or not platform.os or not platform.architecture:
            raise IntegrityError("image config does not say which os and architecture it is for")
        settings = document.get("config")
        settings = {} if settings is None else _object(settings, "config of the image config")
        return cls(
            platform,
            _diff_ids(document.get("rootfs")),
            _strings(settings.get("Env"), "Env"),
            _strings(settings.get("Entrypoint"), "Entrypoint"),
            _strings(settings.get("Cmd"), "Cmd"),
            _string(settings.get("WorkingDir"), "WorkingDir"),
            _string(settings.get("User"), "User"),
            string_map(settings.get("Labels"), "Labels of the image config"),
            _string(settings.get("StopSignal"), "StopSignal"),
            _keys(settings.get("ExposedPorts"), "ExposedPorts"),
            _keys(settings.get("Volumes"), "Volumes"),
            data,
        )


def _object(value: Json, what: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise IntegrityError(f"{what} is not an object")
    return value


def _diff_ids(value: Json) -> tuple[Digest, ...]:
    rootfs = _object(value, "rootfs of the image config")
    if rootfs.get("type") != "layers":
        raise IntegrityError("rootfs of the image config is not of type layers")
    items = rootfs.get("diff_ids")
    if items is None:  # how Go writes the empty list of an image without layers
        return ()
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise IntegrityError("diff_ids of the image config is not a list of digests")
    if len(items) > MAX_LAYERS:
        raise IntegrityError(f"image config has {len(items)} diff_ids, more than the {MAX_LAYERS} allowed")
    try:
        return tuple(Digest.parse(str(item)) for item in items)
    except UsageError as error:
        raise IntegrityError(f"diff_ids of the image config: {error.message}") from error


def _string(value: Json, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise IntegrityError(f"{what} of the image config is not a plain string")
    return value


def _strings(value: Json, what: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise IntegrityError(f"{what} of the image config is not a list")
    if None in value:
        raise IntegrityError(f"{what} of the image config has an item that is null")
    return tuple(_string(item, what) for item in value)


def _keys(value: Json, what: str) -> tuple[str, ...]:
    """The members of an object that Go writes for a set: every value is ``{}``."""
    if value is None:
        return ()
    return tuple(sorted(_string(key, what) for key in _object(value, f"{what} of the image config")))
