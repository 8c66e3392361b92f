"""What is asked of a mount's process and what it answers, as JSON lines.

Messages, one JSON object a line: to the process a :class:`MountRequest`; from it any number of
``{"type": "notice"}``, then one ``{"type": "ready"}`` (a :class:`MountInfo`) or ``{"type": "error"}``.
"""

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from veneer.container.options import ContainerOptions
from veneer.mount.state import Process
from veneer.oci.descriptor import Platform
from veneer.oci.reference import LayoutReference, parse_reference
from veneer.prefetch.profile import DEFAULT_WORKLOAD
from veneer.settings import Settings

__all__ = [
    "RECORDED",
    "RESIDENT",
    "ContainerRequest",
    "MountInfo",
    "MountRequest",
    "RunRequest",
    "ShortRun",
    "absolute_image",
]

#: Backends that the daemon serves; ``auto`` is its to decide.
RESIDENT = ("auto", "erofs-fanotify")
#: In the directory of a mount that records: the profile, written when it is asked for.
RECORDED = "recorded.json"


@dataclass(frozen=True, slots=True)
class ContainerRequest:
    """What makes a mount the root of a container: its place is private, and a bundle lies next to it.

    Args:
        options: how the container differs from what the image says.
        runtime: the program that will run it.
        owner: the process that runs the runtime. Its end is the end of the container and of the mount.
    """

    options: ContainerOptions
    runtime: Path
    owner: Process

    def to_json(self) -> dict[str, object]:
        """The request as a JSON object."""
        return {
            "options": self.options.to_json(),
            "runtime": os.fspath(self.runtime),
            "owner": asdict(self.owner),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ContainerRequest":
        """Read what :meth:`to_json` wrote."""
        options = ContainerOptions.from_json(value["options"])
        return cls(options, Path(value["runtime"]), Process(**value["owner"]))


@dataclass(frozen=True, slots=True)
class MountRequest:
    """One mount to make. Every path is absolute: the process that gets it works in another directory.

    Args:
        image: reference of the image.
        mountpoint: an empty directory, or a name in an existing one; for a container it does not matter.
        settings: of the invocation.
        writable: whether an overlay goes on top.
        upper: where what is written is kept; None for a layer that is thrown away.
        container: for the root of a container.
        record: note what is read of it; takes the backend erofs-fanotify, and uses no pack.
        workload: what it is for: whose pack is used, if there is one.
        complete: fetch all of the image in the background.
    """

    image: str
    mountpoint: Path
    settings: Settings
    writable: bool = False
    upper: Path | None = None
    container: ContainerRequest | None = None
    record: bool = False
    workload: str = DEFAULT_WORKLOAD
    complete: bool = False

    @classmethod
    def create(
        cls,
        image: str,
        mountpoint: Path,
        settings: Settings,
        *,
        writable: bool = False,
        upper: Path | None = None,
        container: ContainerRequest | None = None,
        record: bool = False,
        workload: str = DEFAULT_WORKLOAD,
        complete: bool = False,
    ) -> "MountRequest":
        """A request from what a user typed in the current directory. Raises UsageError."""
        return cls(
            absolute_image(image),
            Path(os.path.realpath(mountpoint)),
            replace(
                settings,
                cache_dir=settings.cache_dir.absolute(),
                run_dir=settings.run_dir.absolute(),
                authfile=settings.authfile and settings.authfile.absolute(),
                ca_file=settings.ca_file and settings.ca_file.absolute(),
            ),
            writable or upper is not None,
            upper and upper.absolute(),
            container,
            record,
            workload,
            complete,
        )

    def to_json(self) -> dict[str, object]:
        """The request as a JSON object."""
        settings = {item.name: getattr(self.settings, item.name) for item in fields(Settings)}
        settings["platform"] = str(self.settings.platform)
        settings["insecure"] = sorted(self.settings.insecure)
        return {
            "image": self.image,
            "mountpoint": os.fspath(self.mountpoint),
            "settings": {k: os.fspath(v) if isinstance(v, Path) else v for k, v in settings.items()},
            "writable": self.writable,
            "upper": self.upper and os.fspath(self.upper),
            "container": self.container and self.container.to_json(),
            "record": self.record,
            "workload": self.workload,
            "complete": self.complete,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "MountRequest":
        """Read what :meth:`to_json` wrote."""
        settings, upper, container = value["settings"], value["upper"], value["container"]
        if not isinstance(settings, dict):
            raise TypeError("not a mount request")
        return cls(
            str(value["image"]),
            Path(str(value["mountpoint"])),
            Settings(
                **settings
                | {
                    "cache_dir": Path(settings["cache_dir"]),
                    "run_dir": Path(settings["run_dir"]),
                    "platform": Platform.parse(settings["platform"]),
                    "authfile": settings["authfile"] and Path(settings["authfile"]),
                    "ca_file": settings["ca_file"] and Path(settings["ca_file"]),
                    "insecure": frozenset(settings["insecure"]),
                }
            ),
            bool(value["writable"]),
            Path(str(upper)) if upper else None,
            container and ContainerRequest.from_json(container),
            value.get("record") is True,
            str(value.get("workload", DEFAULT_WORKLOAD)),
            value.get("complete") is True,
        )


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One container to run.

    Args:
        image: reference of the image.
        options: how the container differs from what the image says.
        runtime: name of the OCI runtime; None for the first that is installed.
        timing: note when what happened, also the first output, which then goes through this process.
        workload: whose pack to use, if there is one.
    """

    image: str
    options: ContainerOptions
    runtime: str | None = None
    timing: bool = False
    workload: str = DEFAULT_WORKLOAD

    def mount(self, settings: Settings, runtime: Path, owner: Process, *, record: bool = False) -> MountRequest:
        """The mount that is the container's root, for the process that will run it. Raises UsageError."""
        return MountRequest.create(
            self.image,
            Path("/"),
            settings,
            writable=True,
            container=ContainerRequest(self.options, runtime, owner),
            record=record,
            workload=self.workload,
        )


class ShortRun(NamedTuple):
    """A command line of ``veneer run`` that can go the short way.

    Args:
        request: what to run.
        settings: of the invocation.
        report: where the command writes how it went.
    """

    request: RunRequest
    settings: Settings
    report: Path | None


@dataclass(frozen=True, slots=True)
class MountInfo:
    """A mount that is up.

    Args:
        id: names it in the run directory.
        image: the reference.
        digest: of the image manifest.
        mountpoint: where it is.
        pid: who serves it.
        backend: how it is mounted.
        backend_reason: why by that one.
        writable: whether it can be written to.
        upper: where what is written is kept, when the user said so.
        index_origin: how the index was found.
        log: what the process has to say.
        bundle: for a container: the OCI bundle.
        requests: HTTP requests made so far.
        bytes_received: and what they brought.
        seconds: from the request to the mount.
    """

    id: str
    image: str
    digest: str
    mountpoint: str
    pid: int
    backend: str
    backend_reason: str
    writable: bool
    upper: str | None
    index_origin: str
    log: str
    bundle: str | None
    requests: int
    bytes_received: int
    seconds: float

    def to_json(self) -> dict[str, object]:
        """The facts by name."""
        return asdict(self)


def absolute_image(text: str) -> str:
    """The same image, meant from any working directory."""
    reference = parse_reference(text)
    if isinstance(reference, LayoutReference):
        reference = replace(reference, path=reference.path.absolute())
    return str(reference)
