"""Starting and running real programs, veneer among them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: How long a server may take until it answers.
START_DEADLINE_S = 60.0


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(port: int) -> bool:
    """Whether something accepts connections on a loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def program(argv: list[str], log: Path, ready: Callable[[], bool]) -> Iterator[None]:
    """Run a server until the end of the block; fail with its log when it does not become ready."""
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + START_DEADLINE_S
            while not ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"{argv[0]} did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait(30)


def run(*argv: str | Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and fail with all its output unless it exits with ``code``."""
    result = subprocess.run(
        [str(argument) for argument in argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
    )
    if result.returncode != code:
        pytest.fail(
            f"{argv} exited with {result.returncode}:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
        )
    return result


@dataclass(frozen=True)
class Veneer:
    """The installed command with directories of its own."""

    cache: Path
    runtime: Path

    def __call__(self, *argv: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run ``veneer ARGV`` and expect an exit code."""
        return run(
            Path(sys.executable).with_name("veneer"),
            *argv,
            code=code,
            VENEER_CACHE_DIR=str(self.cache),
            VENEER_RUN_DIR=str(self.runtime),
        )
