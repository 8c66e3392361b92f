"""Result directories with made-up events, as a bench would leave them."""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from veneer.lab.records import (
    Environment,
    ImageEvent,
    LimitEvent,
    Machine,
    Network,
    NetworkEvent,
    ResultWriter,
    RunEvent,
    SetupEvent,
    SystemEvent,
)
from veneer.timing.record import TimedDevice, TimedMark, TimedPhase, TimedRange, TimedRead, TimingRecord

__all__ = ["LINES", "SYSTEMS", "a_start", "environment", "write_results"]

LINES = (Network("0ms", 0, 0), Network("10ms-1gbit", 10, 1000), Network("50ms-100mbit", 50, 100))
#: Part of containerd's time, and megabytes.
SYSTEMS: Mapping[str, tuple[float, float]] = {
    "veneer-recorded": (0.08, 4.1),
    "veneer-none": (0.27, 22.0),
    "veneer-warm": (0.05, 0.0),
    "containerd": (1.0, 72.0),
    "local-warm": (0.04, 0.0),
}
_FULL_S = {"0ms": 3.1, "10ms-1gbit": 3.4, "50ms-100mbit": 9.0}


def environment(images: tuple[str, ...] = ("python", "redis"), blocks: int = 5) -> Environment:
    return Environment(
        schema=1,
        began="2026-11-26T10:00:00Z",
        command=("/usr/bin/veneer", "lab", "bench", *images, "--blocks", str(blocks), "-o", "results"),
        working_directory="/home/user/veneer",
        commit="0123456789abcdef0123456789abcdef01234567",
        modified=False,
        seed=1,
        blocks={line.name: blocks for line in LINES},
        images=images,
        systems=tuple(SYSTEMS),
        networks=LINES,
        versions={"veneer": "0.1.0", "containerd": "1.7.1"},
        machine=Machine(
            "6.18.44", "x86_64", "A processor", 2, 24 << 30, "ext4 on /dev/vda", 128, {"governor": "none"}
        ),
        variables={},
    )


def write_results(directory: Path, *, hostile: str = "", blocks: int = 5) -> None:
    """Results of two images over three distances; ``hostile`` is in every text that comes from outside."""
    rng = random.Random(7)
    about = environment(blocks=blocks)
    if hostile:
        about = replace(
            about,
            command=(*about.command, hostile),
            machine=replace(about.machine, cpu=hostile, settings={hostile: hostile}),
            versions={hostile: hostile},
        )
    with ResultWriter(directory, about) as writer:
        for image in about.images:
            command = ("python3", "-c", hostile or "print(1)")
            digest = "sha256:" + "ab" * 32
            writer.write(ImageEvent(image, digest, command, "exit", 2, 72_000_000, 220_000_000, 0.1))
            writer.write(
                SetupEvent(image, "convert", 12.5, {"index_size": 124_900, "pack_stored": 3_900_000}, 0.2)
            )
        for system in about.systems:
            reference = system == "containerd"
            writer.write(SystemEvent(system, f"starts {hostile}", not reference, reference, None, 0.3))
        for line in LINES:
            writer.write(
                NetworkEvent(
                    line.name, line.rtt_ms + 0.1, 2 * line.rtt_ms + 0.2, line.mbit, line.mbit, 0.4, 0.4
                )
            )
            for image in about.images:
                for block in range(blocks):
                    for position, system in enumerate(rng.sample(list(SYSTEMS), len(SYSTEMS))):
                        writer.write(_run(rng, image, system, line, block, position, hostile))
                for system in ("veneer-recorded", "veneer-none"):
                    run = _run(rng, image, system, line, -1, 0, hostile)
                    start = a_start(rng, packed=system == "veneer-recorded", name=f"{image}{hostile}")
                    writer.write(replace(run, outcome="ok", error=None, timing=start.to_json()))
                writer.write(LimitEvent(image, line.name, 0.2 + 3 * line.rtt_ms / 1e3, 3, 4_000_000, 0.12, 9.9))


def _run(
    rng: random.Random, image: str, system: str, line: Network, block: int, position: int, hostile: str
) -> RunEvent:
    part, megabytes = SYSTEMS[system]
    seconds = _FULL_S[line.name] * part * rng.lognormvariate(0, 0.08)
    failed = (block, position, line.name) == (0, 0, "0ms")
    size = int(megabytes * 1e6)
    return RunEvent(
        image=image,
        system=system,
        network=line.name,
        block=block,
        position=position,
        outcome="timeout" if failed else "ok",
        seconds=None if failed else seconds,
        command=("veneer", "run", image),
        began_s=1.0,
        first_output_s=None,
        exit_code=0,
        network_bytes=size,
        network_bytes_up=size // 50,
        connections=4,
        cpu_s=seconds,
        proxy_cpu_s=0.1,
        requests=None if system == "containerd" else 31,
        checks={"lazy": True},
        error=f"did not end {hostile}" if failed else None,
        report=None,
        timing=None,
        at_s=5.0,
        arrival_s=tuple(seconds * (n + 2) / 14 for n in range(11)) if size else (),
        arrival_bytes=tuple(size * (n + 1) // 11 for n in range(11)) if size else (),
    )


def a_start(rng: random.Random, *, packed: bool, name: str) -> TimingRecord:
    """A start that is like one: the requests of a pack together, or one miss after the other."""
    layer = TimedDevice("sha256:" + "12" * 32, "layer", 220 << 20, 72 << 20)
    pack = TimedDevice("sha256:" + "34" * 32, "pack", 12 << 20, 4 << 20)
    ranges, reads, at = [], [], 80.0
    for n in range(3 if packed else 28):
        size = (4 << 20) if packed else rng.randrange(64 << 10, 2 << 20)
        offset = n * size if packed else rng.randrange(0, 200 << 20) // 4096 * 4096
        sent = 50.0 if packed else at
        ready = sent + 12 + size / 400e3
        ranges.append(
            TimedRange(
                1 if packed else 0, offset // 3, size // 3, offset, size, 5, "profile" if packed else "demand",
                sent - 2 * n * packed, sent, sent + 11, ready - 2, ready, 3.0, None,
            )
        )  # fmt: skip
        at = ready + rng.expovariate(0.3)
        reads += [
            TimedRead(ready + k, 1 if packed else 0, offset + 8192 * k, 8192, ready - sent if not k else 0)
            for k in range(7)
        ]
    end = max(one.ended for one in ranges) + 20
    return TimingRecord(
        image=name,
        digest="sha256:" + "ab" * 32,
        backend="erofs-fanotify",
        command=("python3", "-c", "print(1)"),
        zero_s=100.0,
        phases=(
            TimedPhase("cli", "start-up", 0.0, 38.0),
            TimedPhase("cli", "ask", 38.0, 90.0),
            TimedPhase("daemon", "resolve", 40.0, 52.0),
            TimedPhase("daemon", "index", 52.0, 64.0),
            TimedPhase("daemon", "show", 66.0, 88.0),
        ),
        marks=(
            TimedMark("daemon", "mounted", 89.0),
            TimedMark("cli", "first output", end - 3),
            TimedMark("cli", "end", end),
        ),
        devices=(layer, pack) if packed else (layer,),
        ranges=tuple(ranges),
        reads=tuple(reads),
    )
