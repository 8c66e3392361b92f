"""Image configs from hostile bytes."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oci.strategies import damaged
from veneer.errors import IntegrityError
from veneer.oci.config import MAX_CONFIG_SIZE, ImageConfig
from veneer.oci.descriptor import Platform
from veneer.oci.digest import Digest
from veneer.oci.manifest import MAX_LAYERS

DIFF_IDS = [str(Digest.of(b"one")), str(Digest.of(b"two"))]
SETTINGS = {
    "Env": ["PATH=/usr/bin", "EMPTY="],
    "Entrypoint": ["/entry", "--flag"],
    "Cmd": ["serve", ""],
    "WorkingDir": "/srv",
    "User": "app:staff",
    "Labels": {"org.example": "yes"},
    "StopSignal": "SIGINT",
    "ExposedPorts": {"80/tcp": {}, "443/tcp": {}},
    "Volumes": {"/data": {}, "/cache": {}},
}
FULL = {
    "architecture": "arm64",
    "os": "linux",
    "variant": "v8",
    "created": "2024-01-01T00:00:00Z",
    "config": SETTINGS,
    "rootfs": {"type": "layers", "diff_ids": DIFF_IDS},
    "history": [{"created_by": "COPY"}, 5, None],
}


def parse(value: Any) -> ImageConfig:
    return ImageConfig.parse(json.dumps(value).encode())


def with_settings(**members: Any) -> dict[str, Any]:
    return FULL | {"config": SETTINGS | members}


def test_everything_that_is_read() -> None:
    config = parse(FULL)
    assert config == ImageConfig(
        platform=Platform("linux", "arm64", "v8"),
        diff_ids=(Digest.of(b"one"), Digest.of(b"two")),
        env=("PATH=/usr/bin", "EMPTY="),
        entrypoint=("/entry", "--flag"),
        cmd=("serve", ""),
        working_dir="/srv",
        user="app:staff",
        labels={"org.example": "yes"},
        stop_signal="SIGINT",
        exposed_ports=("443/tcp", "80/tcp"),
        volumes=("/cache", "/data"),
        raw=json.dumps(FULL).encode(),
    )


@pytest.mark.parametrize("settings", ["absent", None, {}, dict.fromkeys(SETTINGS)])
def test_settings_may_be_absent_or_null(settings: Any) -> None:
    value = FULL | {"config": settings}
    if settings == "absent":
        del value["config"]
    config = parse(value)
    assert (config.env, config.entrypoint, config.cmd) == ((), (), ())
    assert (config.working_dir, config.user, config.stop_signal) == ("", "", "")
    assert (config.labels, config.exposed_ports, config.volumes) == ({}, (), ())


def test_image_without_layers() -> None:
    for rootfs in ({"type": "layers", "diff_ids": None}, {"type": "layers", "diff_ids": []}):
        assert parse(FULL | {"rootfs": rootfs}).diff_ids == ()


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        FULL | {"os": ""},
        FULL | {"os": None},
        FULL | {"os": 5},
        FULL | {"architecture": False},
        FULL | {"variant": []},
        FULL | {"config": []},
        FULL | {"config": False},
        FULL | {"rootfs": None},
        FULL | {"rootfs": []},
        FULL | {"rootfs": {"diff_ids": DIFF_IDS}},
        FULL | {"rootfs": {"type": "foreign", "diff_ids": DIFF_IDS}},
        FULL | {"rootfs": {"type": "layers", "diff_ids": {}}},
        FULL | {"rootfs": {"type": "layers", "diff_ids": [None]}},
        FULL | {"rootfs": {"type": "layers", "diff_ids": ["sha256:0"]}},
        FULL | {"rootfs": {"type": "layers", "diff_ids": DIFF_IDS[:1] * (MAX_LAYERS + 1)}},
        with_settings(Env="PATH=/bin"),
        with_settings(Env=[5]),
        with_settings(Env=[None]),
        with_settings(Env=["A=\0"]),
        with_settings(Entrypoint="/bin/sh"),
        with_settings(Cmd=[["nested"]]),
        with_settings(Cmd=["a\0b"]),
        with_settings(WorkingDir=["/"]),
        with_settings(WorkingDir="/\0"),
        with_settings(User=0),
        with_settings(Labels={"a": None}),
        with_settings(Labels=[]),
        with_settings(StopSignal=15),
        with_settings(ExposedPorts=["80/tcp"]),
        with_settings(Volumes={"/a\0": {}}),
    ],
    ids=range(32),
)
def test_malformed_configs(value: Any) -> None:
    with pytest.raises(IntegrityError):
        parse(value)


def test_size_is_bounded() -> None:
    data = json.dumps(FULL).encode()
    assert ImageConfig.parse(data.ljust(MAX_CONFIG_SIZE)).user == "app:staff"
    with pytest.raises(IntegrityError, match="more than"):
        ImageConfig.parse(data.ljust(MAX_CONFIG_SIZE + 1))


@settings(deadline=None, max_examples=300)
@given(damaged(FULL))
def test_damaged_configs_parse_or_are_refused(value: Any) -> None:
    try:
        config = parse(value)
    except IntegrityError:
        return
    assert config.platform.os
    assert all("\0" not in text for text in (*config.env, *config.entrypoint, *config.cmd, config.user))


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        ImageConfig.parse(data)
