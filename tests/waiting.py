"""Waiting for what other processes do and tell nobody."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

#: Longer than this machine is ever busy; only a failing test waits so long.
PATIENCE_S = 60.0


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it is so, or fail."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def delete(directory: Path) -> None:
    """Delete a directory that somebody may be writing to: what comes meanwhile, too."""
    for _ in range(100):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
    pytest.fail(f"{directory} cannot be deleted")
