"""Servers that scripts start and stop."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["VENEER", "server"]

#: The command of the environment that runs the script.
VENEER = Path(sys.executable).with_name("veneer")


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
