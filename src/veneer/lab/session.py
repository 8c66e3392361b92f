"""A whole bench: images, servers, variants, blocks, limits, and everything gone at the end but the results."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from veneer.errors import UsageError
from veneer.events import Notice, Reporter, silent
from veneer.lab.bench import Blocks, run_blocks
from veneer.lab.build import BuiltImage, build_images, layout_of, store_image
from veneer.lab.imageset import ImageSpec, Probe
from veneer.lab.limit import limits
from veneer.lab.machine import environment_of, memory_available
from veneer.lab.records import (
    ImageEvent,
    Network,
    ResultWriter,
    SetupEvent,
    SystemEvent,
    read_events,
)
from veneer.lab.servers import containerd, docker_registry, find_program
from veneer.lab.systems import Containerd, Given, Local, ParallelPull, System
from veneer.lab.variants import Variants
from veneer.lab.veneered import VENEERED, Veneered
from veneer.lab.workplace import Subject, Workplace, veneer_program
from veneer.mount.kernel import mount_table

__all__ = ["SYSTEMS", "BenchPlan", "find_systems", "run_bench"]

#: Every image is in the registry up to four times: as it is, converted, with a pack, with a sidecar.
_COPIES = 4
_REGISTRY_SPARE = 512 << 20
_OTHERS = ("containerd", "parallel-pull", "local-warm", "local-cold")
#: All systems that need no command from the user.
SYSTEMS = (*VENEERED, *_OTHERS)


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What to measure, and where.

    Args:
        images: which; they are built if need be.
        systems: names.
        networks: distances.
        blocks: how many, by network name.
        seed: of the order of the blocks.
        output: result directory; must not hold results.
        image_dir: where images are kept.
        work_dir: for everything else; must not be on an overlay or tmpfs. Deleted at the end.
        given: commands of the user's, by system name; see :class:`~veneer.lab.systems.Given`.
        resets: what wipes their state, by system name.
        timed: names of images whose starts are noted down in detail.
        tools_warm: start a tiny container before each measurement.
        command: the command line, for the record.
    """

    images: Sequence[ImageSpec]
    systems: Sequence[str]
    networks: Sequence[Network]
    blocks: Mapping[str, int]
    seed: int
    output: Path
    image_dir: Path
    work_dir: Path
    given: Mapping[str, str]
    resets: Mapping[str, str]
    timed: frozenset[str]
    tools_warm: bool
    command: Sequence[str]


def find_systems(names: Sequence[str], given: Mapping[str, str]) -> tuple[str, ...]:
    """Names of systems, checked, and of those given; all when there are no names. Raises UsageError."""
    known = (*SYSTEMS, *given)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"no such system: {unknown[0]}", hint=f"one of {', '.join(known)}")
    return tuple(dict.fromkeys((*names, *given))) if names else known


def run_bench(plan: BenchPlan, report: Reporter = silent) -> None:
    """Measure, and leave the events in ``plan.output``. Takes root. Blocks.

    Raises:
        UsageError: there are results already; this is no root; a port is taken.
        NotFound: a program is missing.
        Unavailable: something that has to work before anything is measured does not.
    """
    if os.geteuid() != 0:
        raise UsageError("veneer lab bench mounts and drops caches, which takes root")
    if (plan.output / "events.jsonl").exists():
        raise UsageError(f"{plan.output} has results already", hint="choose another --output")
    built = build_images(plan.images, plan.image_dir, report=report)
    subjects = [
        Subject(spec, image, layout_of(plan.image_dir)) for spec, image in zip(plan.images, built, strict=True)
    ]
    began = time.monotonic()
    environment = environment_of(
        plan.image_dir,
        command=plan.command,
        seed=plan.seed,
        blocks=plan.blocks,
        images=[spec.name for spec in plan.images],
        systems=plan.systems,
        networks=plan.networks,
    )
    with ResultWriter(plan.output, environment) as writer, ExitStack() as stack:
        stack.enter_context(_ended_by(signal.SIGTERM, signal.SIGHUP))
        place = stack.enter_context(_workplace(plan, built))
        _announce(subjects, writer, began)

        def tell(image: str, step: str, seconds: float, facts: Mapping[str, float]) -> None:
            writer.write(SetupEvent(image, step, seconds, facts, time.monotonic() - began))
            report(Notice(f"{image}: made {step} in {seconds:.1f} s"))

        variants = Variants(place, plan.output / "profiles", tell)
        rehearsal = _rehearsal(place)
        systems = [_system(name, plan, place, variants) for name in plan.systems]
        for system in systems:
            writer.write(
                SystemEvent(
                    system.name,
                    system.about,
                    system.lazy,
                    system.reference,
                    system.command,
                    time.monotonic() - began,
                )
            )
        for system in systems:
            system.prepare_rehearsal(rehearsal)
            for subject in subjects:
                system.prepare(subject)
        blocks = Blocks(subjects, systems, plan.networks, plan.blocks, plan.seed, plan.tools_warm, plan.timed)
        run_blocks(place, blocks, rehearsal, writer, plan.output, began=began, report=report)
        for limit in limits(read_events(plan.output), plan.networks, time.monotonic() - began):
            writer.write(limit)


@contextmanager
def _ended_by(*signals: signal.Signals) -> Iterator[None]:
    """Have signals end the block like an interrupt, so that servers and mounts are not left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(subjects: Sequence[Subject], writer: ResultWriter, began: float) -> None:
    for subject in subjects:
        spec, built = subject.spec, subject.built
        writer.write(
            ImageEvent(
                spec.name,
                built.digest,
                spec.command,
                spec.probe.kind,
                built.layers,
                built.stored,
                built.size,
                time.monotonic() - began,
            )
        )


def _system(name: str, plan: BenchPlan, place: Workplace, variants: Variants) -> System:
    if name in plan.given:
        return Given(place, variants, name, plan.given[name], plan.resets.get(name, ""))
    if name in VENEERED:
        return Veneered(place, variants, name)
    if name in ("local-warm", "local-cold"):
        return Local(place, variants, warm=name == "local-warm")
    return Containerd(place, variants) if name == "containerd" else ParallelPull(place, variants)


@contextmanager
def _workplace(plan: BenchPlan, built: Sequence[BuiltImage]) -> Iterator[Workplace]:
    """A directory, a registry in memory, a daemon of each kind; all of them gone at the end."""
    if plan.work_dir.exists():
        raise UsageError(f"{plan.work_dir} is there already", hint="delete what an earlier bench left there")
    plan.work_dir.mkdir(parents=True)
    directory = plan.work_dir.resolve()
    own = {"VENEER_RUN_DIR": str(directory / "run"), "VENEER_CACHE_DIR": str(directory / "prepare-cache")}
    # Modules are compiled once, as they are where veneer is installed.
    environment = os.environ | own | {"PYTHONDONTWRITEBYTECODE": ""}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        stack.callback(_unmount_below, directory)
        memory = stack.enter_context(_memory(directory / "registry", _COPIES * sum(i.stored for i in built)))
        registry = stack.enter_context(docker_registry(memory))
        socket = None
        if "containerd" in plan.systems:
            socket = stack.enter_context(containerd(directory / "containerd"))
        place = Workplace(directory, registry, socket, environment)
        if any(name in VENEERED for name in plan.systems):
            place.run([veneer_program(), "daemon", "start"])
            stack.callback(place.run, [veneer_program(), "daemon", "stop", "--force"])
        yield place


def _unmount_below(directory: Path) -> None:
    """Undo what a start that failed in the middle has left mounted."""
    below = [entry.mountpoint for entry in mount_table() if directory in entry.mountpoint.parents]
    for mountpoint in reversed(below):
        subprocess.run(["umount", "--lazy", mountpoint], check=True)


@contextmanager
def _memory(directory: Path, size: int) -> Iterator[Path]:
    """A file system in memory, so that dropped caches make no registry slow. Raises UsageError."""
    size += _REGISTRY_SPARE
    if size > memory_available():
        raise UsageError(
            f"the registry takes up to {size >> 20} MiB of memory, more than there is",
            hint="measure fewer images at once",
        )
    place = Workplace(directory, 0)
    directory.mkdir()
    place.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "veneer-lab", directory])
    try:
        yield directory
    finally:
        place.run(["umount", directory])


def _rehearsal(place: Workplace) -> Subject:
    """A tiny image in a layout of its own."""
    spec = ImageSpec(
        "rehearsal",
        "brings programs into memory",
        (),
        ("/bin/busybox", "true"),
        Probe("exit"),
        {"bin/busybox": Path(find_program("busybox")).read_bytes()},
    )
    directory = place.directory / "rehearsal"
    return Subject(spec, store_image(spec, (), directory), layout_of(directory))
