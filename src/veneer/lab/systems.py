"""Systems that start containers, as a bench sees them.

A system says what it needs to have made of an image, how it is brought back to a cold state, which command a
user would type, and what its own counters tell afterwards. It is measured from outside, by that command.
"""

import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from veneer.container.runtime import may_be_left
from veneer.errors import UsageError
from veneer.lab.distance import Counters
from veneer.lab.servers import find_program
from veneer.lab.variants import Variants
from veneer.lab.workplace import Subject, Workplace

__all__ = ["Containerd", "Facts", "Given", "Launch", "Local", "ParallelPull", "System", "parse_given"]

_NAMESPACE = "lab"


@dataclass(frozen=True, slots=True)
class Launch:
    """What is spawned."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Facts:
    """What counters say after a start.

    Args:
        checks: what has to hold for the start to count.
        requests: HTTP requests; None when nobody counted.
        report: the document of ``veneer run --report``.
        timing: the timing record.
    """

    checks: Mapping[str, bool] = field(default_factory=dict)
    requests: int | None = None
    report: Mapping[str, object] | None = None
    timing: Mapping[str, object] | None = None


class System(ABC):
    """One way to start a container. Used by one thread, one start at a time.

    Attributes:
        name: in results.
        about: what it is, in a sentence.
        lazy: it is meant to start before the image is there.
        reference: ratios are to this one.
        command: as the user gave it, if he did.
        variant: of the image that it takes.
    """

    name: str
    about: str
    lazy = False
    reference = False
    command: str | None = None
    variant = "plain"

    def __init__(self, place: Workplace, variants: Variants) -> None:
        self.place = place
        self.variants = variants

    def prepare(self, subject: Subject) -> None:
        """Make what it needs of an image. Raises VeneerError."""
        self.variants.need(subject, self.variant)

    @abstractmethod
    def wipe(self, subject: Subject) -> None:
        """Back to what was before the image was ever started: nothing of it on this machine."""

    @abstractmethod
    def launch(self, subject: Subject, port: int) -> Launch:
        """What a user would type to start the image from the registry on ``port``."""

    def warm_up(self, subject: Subject, port: int) -> Launch | None:
        """A start before the one that is measured, with nothing in between; None for a cold system."""
        return None

    def timed(self, launch: Launch) -> Launch | None:
        """The same, with a timing record; None where there are none."""
        return None

    def facts(self, subject: Subject, counters: Counters) -> Facts:
        """What is known after the start. ``counters`` are those of the line at the end of the clock."""
        return Facts()

    @abstractmethod
    def finish(self, subject: Subject) -> None:
        """Remove what a start left behind, whatever became of it."""

    def prepare_rehearsal(self, subject: Subject) -> None:
        """Make what :meth:`rehearsal` needs. Raises VeneerError."""
        self.prepare(subject)

    def rehearsal(self, subject: Subject) -> Launch:
        """A start of a tiny image that is here already, to have the programs in memory, and nothing else."""
        return self.launch(subject, self.place.registry)


class Containerd(System):
    """``ctr image pull`` and ``ctr run`` of a resident containerd, with its overlayfs snapshotter."""

    name = "containerd"
    about = "containerd with overlayfs: pull and unpack, then run"
    reference = True

    def wipe(self, subject: Subject) -> None:
        """Nothing of it on this machine."""
        self.finish(subject)
        for image in self._ctr("images", "list", "--quiet").split():
            if b"/lab/rehearsal-" not in image:
                self._ctr("images", "remove", "--sync", image.decode())

    def launch(self, subject: Subject, port: int) -> Launch:
        """What a user would type."""
        reference = subject.reference(port, "plain")
        ctr = shlex.join([find_program("ctr"), *self._options()])
        pull = f"{ctr} images pull --plain-http --snapshotter overlayfs {reference} >/dev/null"
        run = f"exec {ctr} run --rm --net-host --snapshotter overlayfs {reference} lab-run"
        return Launch(("sh", "-c", f"{pull} && {run}"), self.place.environment)

    def facts(self, subject: Subject, counters: Counters) -> Facts:
        """What its counters say."""
        return Facts({"all of it was pulled": counters.bytes_down >= subject.built.stored})

    def finish(self, subject: Subject) -> None:
        """Nothing is left."""
        if self._ctr("tasks", "list", "--quiet").split():
            self._ctr("tasks", "kill", "--signal", "SIGKILL", "lab-run")
            self._ctr("tasks", "delete", "--force", "lab-run")
        if self._ctr("containers", "list", "--quiet").split():
            self._ctr("containers", "delete", "lab-run")

    def _options(self) -> list[str]:
        return ["--address", str(self.place.containerd), "--namespace", _NAMESPACE]

    def _ctr(self, *arguments: str) -> bytes:
        return self.place.run([find_program("ctr"), *self._options(), *arguments])


class _Bundled(System):
    """What ends in runc with a bundle of ours, an overlay mounted on its ``rootfs``."""

    def wipe(self, subject: Subject) -> None:
        """Nothing of it on this machine."""
        self.finish(subject)

    def finish(self, subject: Subject) -> None:
        """Nothing is left."""
        root = self.variants.bundle(subject) / "rootfs"
        runtime = find_program("runc")
        # runc's own list fails when a container of anybody ends while it looks.
        if may_be_left(runtime, "lab-run"):
            self.place.run([runtime, "delete", "--force", "lab-run"])
        if root.is_mount():
            self.place.run(["umount", root])
        self.place.fresh("overlay")


class Local(_Bundled):
    """An unpacked tree on this machine, under overlayfs: warm, nothing starts sooner with the same runtime."""

    variant = "tree"

    def __init__(self, place: Workplace, variants: Variants, *, warm: bool) -> None:
        super().__init__(place, variants)
        self._warm = warm
        self.name = "local-warm" if warm else "local-cold"
        state = "in memory" if warm else "on a cold page cache"
        self.about = f"an unpacked tree of this machine under overlayfs, {state}"

    def launch(self, subject: Subject, port: int) -> Launch:
        """What a user would type."""
        bundle, overlay = self.variants.bundle(subject), self.place.directory / "overlay"
        layers = f"lowerdir={bundle}/lower,upperdir={overlay}/upper,workdir={overlay}/work"
        make = f"mkdir -p {overlay}/upper {overlay}/work"
        mount = f"{make} && mount -t overlay overlay -o {layers} {bundle}/rootfs"
        run = shlex.join([find_program("runc"), "run", "--bundle", str(bundle), "lab-run"])
        return Launch(("sh", "-c", f"{mount} && exec {run}"), self.place.environment)

    def warm_up(self, subject: Subject, port: int) -> Launch | None:
        """One start, if it is to be warm."""
        return self.launch(subject, port) if self._warm else None

    def facts(self, subject: Subject, counters: Counters) -> Facts:
        """What its counters say."""
        return Facts({"nothing came from the registry": not counters.bytes_down})


class ParallelPull(_Bundled):
    """:mod:`veneer.lab.fullpull`: everything is pulled and unpacked, as fast as we can."""

    name = "parallel-pull"
    about = "all layers in parallel ranges, unpacked as they come, then runc on an overlay"

    def prepare(self, subject: Subject) -> None:
        """Make what it needs."""
        super().prepare(subject)
        self.variants.need(subject, "tree")  # for its bundle

    def launch(self, subject: Subject, port: int) -> Launch:
        """What a user would type."""
        bundle = self.variants.bundle(subject)
        argv = (sys.executable, "-P", "-m", "veneer.lab.fullpull", subject.reference(port, "plain"))
        return Launch((*argv, str(bundle), str(self.place.directory / "overlay")), self.place.environment)

    def facts(self, subject: Subject, counters: Counters) -> Facts:
        """What its counters say."""
        return Facts({"all of it was pulled": counters.bytes_down >= subject.built.stored})


class Given(System):
    """A command of the user's, and one that wipes its state.

    Args:
        name: of the system.
        command: shell text; ``{image}`` is the reference, ``{cmd}`` the image's command, quoted.
        reset: shell text that wipes its state; "" for none.
    """

    lazy = True

    def __init__(self, place: Workplace, variants: Variants, name: str, command: str, reset: str) -> None:
        super().__init__(place, variants)
        self.name, self.command, self._reset = name, command, reset
        self.about = "a command that was given"

    def wipe(self, subject: Subject) -> None:
        """Nothing of it on this machine."""
        if self._reset:
            self.place.run(["sh", "-c", self._reset])

    def launch(self, subject: Subject, port: int) -> Launch:
        """What a user would type."""
        words = {"image": subject.reference(port, "plain"), "cmd": shlex.join(subject.spec.command)}
        text = self.command or ""
        for word, value in words.items():
            text = text.replace(f"{{{word}}}", value)
        return Launch(("sh", "-c", text), self.place.environment)

    def finish(self, subject: Subject) -> None:
        """Nothing is left."""
        # whatever it leaves is for its reset


def parse_given(texts: Sequence[str]) -> dict[str, str]:
    """``NAME=COMMAND`` of the command line. Raises UsageError."""
    out: dict[str, str] = {}
    for text in texts:
        name, equals, command = text.partition("=")
        if not (name and equals and command):
            raise UsageError(f"invalid system {text!r}", hint="write it like NAME='command {image} {cmd}'")
        out[name] = command
    return out
