"""Starting the process of a mount and waiting until it is ready."""

import json
import subprocess
import sys

import trio

from veneer.daemon.request import MountInfo, MountRequest, error_from_json
from veneer.errors import MountError
from veneer.events import Notice, Reporter, silent

__all__ = ["start_mount"]

#: Of what a process that died said last, the part that goes into a message.
MAX_LAST_WORDS = 2000
_CHUNK = 64 << 10


async def start_mount(request: MountRequest, *, report: Reporter = silent) -> MountInfo:
    """Mount an image in the background. Returns when the mount can be used.

    Cancelling ends the process before it is ready; it then leaves nothing behind.

    Raises:
        VeneerError: what the process says, or that it died.
    """
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "veneer.daemon.mountd"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise AssertionError("three pipes were asked for")
    # The process watches its standard input: closing it early, as a cancellation does, ends it.
    async with process.stdin, process.stdout, process.stderr:
        try:
            await process.stdin.send_all(json.dumps(request.to_json()).encode() + b"\n")
            # What was started leaves only its child behind, which is the mount's process.
            await process.wait()
        except trio.BrokenResourceError:
            await process.wait()
        answer = await _answer(process.stdout, report)
        if answer is None:
            last_words = b"".join([chunk async for chunk in process.stderr])
            text = last_words[-MAX_LAST_WORDS:].decode(errors="replace").strip()
            raise MountError(f"the process of the mount died: {text or 'it said nothing'}")
    if answer.pop("type") == "error":
        raise error_from_json(answer)
    return MountInfo(**answer)  # type: ignore[arg-type] # written by MountInfo.to_json


async def _answer(pipe: trio.abc.ReceiveStream, report: Reporter) -> dict[str, object] | None:
    """The first message that is not a notice; None when the pipe ends without one."""
    data = bytearray()
    while True:
        line, newline, rest = data.partition(b"\n")
        if newline:
            data = rest
            message: dict[str, object] = json.loads(line)
            if message["type"] != "notice":
                return message
            report(Notice(str(message["message"])))
        else:
            chunk = await pipe.receive_some(_CHUNK)
            if not chunk:
                return None
            data += chunk
