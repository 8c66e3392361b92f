"""Where a bench works: its directory, its servers, and the programs that it runs beside what it measures."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from veneer.errors import NotFound, Unavailable
from veneer.lab.build import BuiltImage
from veneer.lab.imageset import ImageSpec

__all__ = ["Subject", "Workplace", "veneer_program"]

#: What prepares and cleans up may take; converting a gigabyte takes some 15 s on a quiet machine.
_DEADLINE_S = 900.0
_LAST_LINES = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """An image that takes part.

    Args:
        spec: what runs in it, and when it is ready.
        built: what it is.
        layout: OCI layout that has it, under its name as a tag.
    """

    spec: ImageSpec
    built: BuiltImage
    layout: Path

    @property
    def name(self) -> str:
        """Of the image."""
        return self.spec.name

    def reference(self, port: int, variant: str) -> str:
        """How a registry on loopback has a variant: ``plain`` (as it is), ``lazy``, ``recorded`` and so on."""
        return f"127.0.0.1:{port}/lab/{self.name}-{variant}:1"


@dataclass(frozen=True, slots=True)
class Workplace:
    """What the systems share.

    Args:
        directory: for everything that a bench makes.
        registry: port of the registry, without distance.
        environment: of every program.
        containerd: socket; None when no system needs it.
    """

    directory: Path
    registry: int
    containerd: Path | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def run(self, argv: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> bytes:
        """Run a program to its end; its output. Raises Unavailable when it fails."""
        name = os.path.basename(argv[0])
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=self.environment if environment is None else environment,
                timeout=_DEADLINE_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{name} did not end within {_DEADLINE_S:g} s: {_shown(argv)}") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
            raise Unavailable(f"{_shown(argv)} failed with status {done.returncode}: {'; '.join(said)}")
        return done.stdout

    def fresh(self, name: str) -> Path:
        """An empty directory; what was there is moved aside first, and deleted the next time.

        A directory that is deleted and made again may have the same inode, and pass for the old one.
        """
        path, old = self.directory / name, self.directory / f"{name}.old"
        if old.exists():
            shutil.rmtree(old)
        if path.exists():
            path.rename(old)
        path.mkdir(parents=True)
        return path

    def drop_page_cache(self) -> None:
        """Write out what is dirty, and forget what files and directories hold."""
        self.run(["sync", "--file-system", self.directory])
        Path("/proc/sys/vm/drop_caches").write_text("3")


def veneer_program() -> str:
    """The command that belongs to this interpreter, or else the installed one. Raises NotFound."""
    beside = Path(sys.executable).with_name("veneer")
    found = str(beside) if beside.exists() else shutil.which("veneer")
    if found is None:
        raise NotFound("there is no veneer command beside this Python or on the PATH")
    return found


def timed(began: float) -> float:
    """Seconds since then."""
    return time.monotonic() - began


def _shown(argv: Sequence[str | Path]) -> str:
    return " ".join([os.path.basename(argv[0]), *map(str, argv[1:6])])
