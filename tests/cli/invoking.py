"""Running commands in this process, as a shell sees them."""

import io
import os
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest.mock import patch

from veneer.cli.command import AnyCommand, Group, execute
from veneer.cli.main import VENEER


class Result(NamedTuple):
    """How a command ended, and what it printed."""

    exit_code: int
    content: bytes
    stderr: str

    @property
    def stdout(self) -> str:
        """Standard output as text."""
        return self.content.decode()


def invoke(*argv: str, entry: AnyCommand | Group = VENEER, env: Mapping[str, str] | None = None) -> Result:
    """Run a command line, without the program's name."""
    out, err = io.BytesIO(), io.BytesIO()
    stdout, stderr = (io.TextIOWrapper(stream, "utf-8", write_through=True) for stream in (out, err))
    with redirect_stdout(stdout), redirect_stderr(stderr), patch.dict(os.environ, env or {}):
        try:
            code: object = execute(entry, "veneer", argv)
        except SystemExit as exit_:
            code = exit_.code
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue().decode())
