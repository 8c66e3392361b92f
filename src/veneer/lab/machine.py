"""What a figure depends on besides the code: the machine, the versions of everything, the checkout."""

import datetime as dt
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from veneer import __version__
from veneer.lab.records import SCHEMA, Environment, Machine, Network

__all__ = ["environment_of", "memory_available", "processor_seconds"]

_VERSION_DEADLINE_S = 10.0
#: Program -> how it tells its version.
_PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "containerd": ("--version",),
    "ctr": ("--version",),
    "docker-registry": ("--version",),
    "runc": ("--version",),
    "skopeo": ("--version",),
    "umoci": ("--version",),
    "bsdtar": ("--version",),
    "mmdebstrap": ("--version",),
}
_FACTS = {
    "transparent_hugepage": "/sys/kernel/mm/transparent_hugepage/enabled",
    "governor": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    "clocksource": "/sys/devices/system/clocksource/clocksource0/current_clocksource",
    "dirty_ratio": "/proc/sys/vm/dirty_ratio",
    "tcp_congestion_control": "/proc/sys/net/ipv4/tcp_congestion_control",
}


def environment_of(
    directory: Path,
    *,
    command: Sequence[str],
    seed: int,
    blocks: Mapping[str, int],
    images: Sequence[str],
    systems: Sequence[str],
    networks: Sequence[Network],
) -> Environment:
    """The environment of a bench that works in ``directory``. Runs programs to ask for their versions."""
    commit, modified = _checkout()
    return Environment(
        schema=SCHEMA,
        began=dt.datetime.now(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        command=tuple(command),
        working_directory=os.getcwd(),
        commit=commit,
        modified=modified,
        seed=seed,
        blocks=blocks,
        images=tuple(images),
        systems=tuple(systems),
        networks=tuple(networks),
        # One release takes up to twice the time of another's build of it: which one was it?
        versions={
            "veneer": __version__,
            "python": f"{platform.python_version()} of {sys.base_prefix}",
            **_versions(),
        },
        machine=_machine(directory),
        variables={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("VENEER_") and not name.endswith("_AUTH")
        },
    )


def processor_seconds() -> float:
    """Seconds that all processors together have worked since the boot."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def memory_available() -> int:
    """Bytes that may be used without swapping."""
    return _memory("MemAvailable")


def _memory(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0


def _machine(directory: Path) -> Machine:
    host, cpu = os.uname(), ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    device = directory.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    read_ahead = _read(block / "queue/read_ahead_kb") or _read(block.resolve().parent / "queue/read_ahead_kb")
    facts = {name: _read(Path(path)) for name, path in _FACTS.items()}
    return Machine(
        kernel=f"{host.release} {host.version}",
        architecture=host.machine,
        cpu=cpu,
        cpus=len(os.sched_getaffinity(0)),
        memory=_memory("MemTotal"),
        file_system=_file_system(directory),
        read_ahead_kb=int(read_ahead) if read_ahead else None,
        settings={name: value for name, value in facts.items() if value},
    )


def _file_system(directory: Path) -> str:
    best = ("", "")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, point, kind, *_ = line.split()
        if directory.resolve().is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, f"{kind} {device}")
    return best[1]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # not every kernel has every file
        return ""


def _versions() -> dict[str, str]:
    out = {}
    for program, arguments in _PROGRAMS.items():
        try:
            done = subprocess.run(
                [program, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_VERSION_DEADLINE_S,
                check=False,
            )
        except FileNotFoundError:
            continue
        lines = (done.stdout or done.stderr).strip().splitlines()
        out[program] = lines[0] if lines else "unknown"
    return out


def _checkout() -> tuple[str | None, bool]:
    """The commit that this code is from, and whether it has changes; None outside of a checkout."""
    here = Path(sys.modules[__name__].__file__ or "").parent
    argv = ["git", "-C", os.fspath(here)]
    try:
        commit = subprocess.run([*argv, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        status = subprocess.run([*argv, "status", "--porcelain"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None, False
    if commit.returncode:
        return None, False
    return commit.stdout.strip(), bool(status.stdout.strip())
