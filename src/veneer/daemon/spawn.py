"""Starting the process of a mount and waiting until it is ready."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import IO

from veneer.daemon.failure import error_from_json
from veneer.daemon.request import MountInfo, MountRequest
from veneer.errors import MountError
from veneer.events import Reporter, event_from_json, silent
from veneer.waiting import wait_readable

__all__ = ["start_mount"]

#: Of what a process that died said last, the part that goes into a message.
MAX_LAST_WORDS = 2000


def start_mount(request: MountRequest, *, report: Reporter = silent) -> MountInfo:
    """Mount an image in the background, served by a process of its own. Returns when the mount can be used.

    An interruption ends the process before it is ready; it then leaves nothing behind.

    Raises:
        VeneerError: what the process says, or that it died.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "veneer.daemon.mountd"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A buffer would try again to send, when it is closed, what nobody has read.
        bufsize=0,
        start_new_session=True,
    )
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise AssertionError("three pipes were asked for")
    # The process watches its standard input: closing it early, as an interruption does, ends it.
    with process.stdin, process.stdout, process.stderr:
        message = memoryview(json.dumps(request.to_json()).encode() + b"\n")
        # One that has died says why on its standard error.
        with suppress(BrokenPipeError):
            while message:
                message = message[os.write(process.stdin.fileno(), message) :]
        # What was started leaves only its child behind, which is the mount's process.
        process.wait()
        answer = _answer(process.stdout, report)
        if answer is None:
            text = process.stderr.read()[-MAX_LAST_WORDS:].decode(errors="replace").strip()
            raise MountError(f"the process of the mount died: {text or 'it said nothing'}")
    if answer.pop("type") == "error":
        raise error_from_json(answer)
    return MountInfo(**answer)  # type: ignore[arg-type] # written by MountInfo.to_json


def _answer(pipe: IO[bytes], report: Reporter) -> dict[str, object] | None:
    """The first message that is no event; None when the pipe ends without one."""
    while wait_readable(pipe.fileno()) and (line := pipe.readline()):
        message: dict[str, object] = json.loads(line)
        if (event := event_from_json(message)) is None:
            return message
        report(event)
    return None
