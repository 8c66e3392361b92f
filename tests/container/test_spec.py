"""The bundle that a runtime gets: what the image says, and what the user changes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from veneer.container.options import ContainerOptions, Volume, parse_environment, parse_volume
from veneer.container.spec import DEFAULT_PATH, command_of, environment_of, runtime_spec, write_bundle
from veneer.container.users import ContainerUser
from veneer.errors import UsageError
from veneer.oci.config import ImageConfig
from veneer.oci.descriptor import Platform

IMAGE = ImageConfig(
    platform=Platform("linux", "amd64"),
    diff_ids=(),
    env=("A=1", "B=x=y", "PATH=/only"),
    entrypoint=("/entry", "-e"),
    cmd=("cmd",),
    working_dir="srv",
    user="",
    labels={},
    stop_signal="",
    exposed_ports=(),
    volumes=(),
    raw=b"",
)
USER = ContainerUser(7, 8, (9,), "/home/seven")


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (IMAGE, ContainerOptions(), ("/entry", "-e", "cmd")),
        (IMAGE, ContainerOptions(arguments=("a", "b")), ("/entry", "-e", "a", "b")),
        (IMAGE, ContainerOptions(entrypoint=("sh",)), ("sh",)),
        (IMAGE, ContainerOptions(entrypoint=("sh",), arguments=("-c", "x")), ("sh", "-c", "x")),
        (IMAGE, ContainerOptions(entrypoint=(), arguments=("x",)), ("x",)),
        (replace(IMAGE, entrypoint=()), ContainerOptions(), ("cmd",)),
        (replace(IMAGE, entrypoint=()), ContainerOptions(arguments=("x",)), ("x",)),
    ],
)
def test_commands(image: ImageConfig, options: ContainerOptions, expected: tuple[str, ...]) -> None:
    assert command_of(image, options) == expected


def test_an_image_without_a_command_needs_one() -> None:
    with pytest.raises(UsageError, match="what to run"):
        command_of(replace(IMAGE, entrypoint=(), cmd=()), ContainerOptions())


def test_the_environment_keeps_its_order_and_takes_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSED", "on")
    monkeypatch.delenv("UNSET", raising=False)
    changes = parse_environment(["B=new", "C=", "PASSED", "UNSET"])
    found = environment_of(IMAGE, changes)
    assert found == {"PATH": "/only", "A": "1", "B": "new", "C": "", "PASSED": "on"}
    assert environment_of(replace(IMAGE, env=()), {}) == {"PATH": DEFAULT_PATH}
    with pytest.raises(UsageError):
        parse_environment(["=x"])


def test_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").touch()
    monkeypatch.chdir(tmp_path)
    assert parse_volume("here:/there") == Volume(tmp_path / "here", "/there")
    assert parse_volume(f"{tmp_path}:/data:ro") == Volume(tmp_path, "/data", read_only=True)
    for wrong in (
        "here",
        "here:",
        ":/x",
        "here:rel",
        "here:/x:rx",
        "here:/",
        "here:/../",
        "no:/x",
        "here:/a:ro:z",
    ):
        with pytest.raises(UsageError):
            parse_volume(wrong)


def test_the_specification(tmp_path: Path) -> None:
    options = ContainerOptions(
        volumes=(Volume(tmp_path, "/data", read_only=True),), hostname="box", network="none", read_only=True
    )
    write_bundle(tmp_path, runtime_spec(IMAGE, options, USER, root="rootfs", name="0123456789abcdef"))
    spec = json.loads((tmp_path / "config.json").read_bytes())
    process = spec["process"]
    assert process["user"] == {"uid": 7, "gid": 8, "additionalGids": [9]}
    assert process["cwd"] == "/srv"
    assert "HOME=/home/seven" in process["env"]
    assert "HOSTNAME=box" in process["env"]
    assert not process["terminal"]
    assert process["noNewPrivileges"] is False
    assert "CAP_SYS_ADMIN" not in process["capabilities"]["bounding"]
    assert spec["root"] == {"path": "rootfs", "readonly": True}
    assert spec["hostname"] == "box"
    assert {"type": "network"} in spec["linux"]["namespaces"]
    assert [m for m in spec["mounts"] if m["type"] == "bind"] == [
        {
            "destination": "/data",
            "type": "bind",
            "source": str(tmp_path),
            "options": ["rbind", "rprivate", "ro"],
        }
    ]
    on_host = runtime_spec(IMAGE, ContainerOptions(), USER, root="/r", name="n")
    assert {"type": "network"} not in json.loads(json.dumps(on_host))["linux"]["namespaces"]


def test_options_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        ContainerOptions(network="bridge")
    with pytest.raises(UsageError):
        ContainerOptions(working_dir="relative")
    spec = runtime_spec(IMAGE, ContainerOptions(arguments=("\udcff",)), USER, root="/r", name="n")
    with pytest.raises(UsageError, match="UTF-8"):
        write_bundle(tmp_path, spec)
