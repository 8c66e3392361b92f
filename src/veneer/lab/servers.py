"""Servers that the lab starts and ends: a registry, a containerd, and the line between.

Each has its files below a directory of its own, listens on loopback or a socket there, and is ended by its
process id when the block ends. Their logs stay in the directory.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from veneer.errors import NotFound, Unavailable

__all__ = ["containerd", "docker_registry", "end", "find_program", "free_port"]

#: How long a server may take until it answers, and until it ends when it is asked to.
START_DEADLINE_S = 30.0
END_DEADLINE_S = 10.0
_POLL_S = 0.02


def find_program(name: str) -> str:
    """The path of a program. Raises NotFound."""
    found = shutil.which(name)
    if found is None:
        raise NotFound(f"{name} is not installed", hint="run scripts/install lab, or install it")
    return found


def free_port() -> int:
    """A port of loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def docker_registry(directory: Path) -> Iterator[int]:
    """Debian's docker-registry on loopback; its port. Raises NotFound, Unavailable."""
    directory.mkdir(parents=True, exist_ok=True)
    port, config = free_port(), directory / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {directory}/data}}}}\n"
        f'http: {{addr: "127.0.0.1:{port}"}}\nlog: {{level: error, accesslog: {{disabled: true}}}}\n'
    )

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with _running([find_program("docker-registry"), "serve", str(config)], directory / "log", listening):
        yield port


@contextmanager
def containerd(directory: Path) -> Iterator[Path]:
    """A containerd with everything of its own below ``directory``; its socket. Raises NotFound, Unavailable."""
    directory.mkdir(parents=True, exist_ok=True)
    address, config = directory / "c.sock", directory / "config.toml"
    config.write_text(
        f'version = 2\nroot = "{directory}/root"\nstate = "{directory}/state"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "{address}"\n'
    )
    with _running([find_program("containerd"), "-c", str(config)], directory / "log", address.exists):
        yield address


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ask a process to end, and make it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


@contextmanager
def _running(argv: Sequence[str], log: Path, ready: Callable[[], bool]) -> Iterator[None]:
    with log.open("wb") as output:
        # A group of its own, so that an interrupt of the bench reaches it through us, after those who use it.
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
        )
        try:
            until = time.monotonic() + START_DEADLINE_S
            while not ready():
                if process.poll() is not None or time.monotonic() > until:
                    last = log.read_text(errors="replace").strip().splitlines()[-3:]
                    raise Unavailable(
                        f"{os.path.basename(argv[0])} did not start: {'; '.join(last)}", hint=f"see {log}"
                    )
                time.sleep(_POLL_S)
            yield
        finally:
            end(process)
