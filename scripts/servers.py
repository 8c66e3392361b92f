"""Servers that scripts start and stop."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["VENEER", "containerd", "docker_registry", "server"]

#: The command of the environment that runs the script.
VENEER = Path(sys.executable).with_name("veneer")
#: How long a server may take until it answers.
START_DEADLINE_S = 30.0


@contextmanager
def server(*argv: str | Path) -> Iterator[str]:
    """Run a server until the end of the block; the loopback address that it names first on standard error."""
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = re.search(r"127\.0\.0\.1:[0-9]+", process.stderr.readline())
            if not address:
                sys.exit(f"{argv[0]} did not start")
            yield address[0]
        finally:
            process.terminate()


@contextmanager
def docker_registry(directory: Path) -> Iterator[str]:
    """Debian's docker-registry on loopback, with its files below ``directory``; its host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    config = directory / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {directory}/data}}}}\n"
        f'http: {{addr: "127.0.0.1:{port}"}}\nlog: {{level: error, accesslog: {{disabled: true}}}}\n'
    )

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with _running(["docker-registry", "serve", str(config)], directory / "log", listening):
        yield f"127.0.0.1:{port}"


@contextmanager
def containerd(directory: Path) -> Iterator[Path]:
    """A containerd with its root, state and socket below ``directory``; the socket."""
    address, config = directory / "c.sock", directory / "config.toml"
    config.write_text(
        f'version = 2\nroot = "{directory}/root"\nstate = "{directory}/state"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "{address}"\n'
    )
    with _running(["containerd", "-c", str(config)], directory / "log", address.exists):
        yield address


@contextmanager
def _running(argv: list[str], log: Path, ready: Callable[[], bool]) -> Iterator[None]:
    with log.open("wb") as output, subprocess.Popen(argv, stdout=output, stderr=output) as process:
        try:
            until = time.monotonic() + START_DEADLINE_S
            while not ready():
                if process.poll() is not None or time.monotonic() > until:
                    sys.exit(f"{argv[0]} did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
