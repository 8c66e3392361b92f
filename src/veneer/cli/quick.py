"""What the console script runs: ``veneer run`` and ``status`` go a short way, all else the long one.

A command line that parses its options and asks the daemon imports for 90 ms, where a bare interpreter starts
in 11: more than the mount takes. So the words of ``veneer run`` go to the daemon as they are, and its answer
says which bundle to run. The daemon sees this process end, and unmounts. Those of ``veneer status`` go the same
way, and its answer is what to print; where a run directory is as good as empty, nobody need be asked.

Whatever is not as simple (no daemon, an option that says how to report, a relative path) takes the long way,
which also says what is wrong with a command line.

Only what an interpreter has loaded anyway is imported here, or is written in C and costs nothing.
"""

import os
import sys
from _json import encode_basestring_ascii, make_scanner
from _socket import AF_UNIX, SOCK_STREAM, socket
from time import monotonic

from veneer.container.run import ContainerRun
from veneer.waiting import wait_readable

# typing takes longer to import than all of this; type checkers know the name.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from veneer.errors import VeneerError

__all__ = ["main"]

#: As in :mod:`veneer.daemon.ask`.
_SOCKET = "daemon.sock"
_CHUNK = 64 << 10
#: What may come before an answer (:mod:`veneer.events`).
_EVENTS = ("notice", "progress")
#: Exit status after Ctrl-C, and when whoever reads our output has seen enough.
_INTERRUPTED, _UNREAD = 130, 141
#: A daemon that does not tell how it stands within this time is not waited for here.
_STATUS_TIMEOUT_S = 5.0
#: In place of an answer about a container that has ended.
_GONE = {"type": "error", "code": 40, "message": "the daemon has gone, and with it what there was to report"}
#: What settings are made of, and where programs are found.
_PREFIXES, _NAMES = ("VENEER_", "XDG_"), ("HOME", "PATH", "REGISTRY_AUTH_FILE")
#: Settings that cannot be wrong.
_DIRECTORIES = ("VENEER_RUN_DIR", "VENEER_CACHE_DIR")
#: What is left in a run directory, and in that of its mounts, when there is neither a daemon nor a mount.
_QUIET, _LOCKS = {"daemon.lock", "daemon.log", "caches.json", "mounts"}, {".lock", ".claim"}


def main() -> "NoReturn":
    """Entry point of the console script."""
    argv = sys.argv[1:]
    way = {"run": _run, "status": _status}.get(argv[0]) if argv else None
    if way is not None and os.geteuid() == 0:
        try:
            code = way(argv[1:])
        except KeyboardInterrupt:
            code = _INTERRUPTED
        if code is not None:
            os._exit(code)
    from veneer.cli.main import main as long_way

    long_way()


def _run(words: list[str]) -> int | None:
    """Run the container that the daemon has made ready; None when it has not.

    However this process ends, the daemon sees it, ends the container and cleans up.
    """
    began = monotonic()
    answer = _ask(_request("run", words))
    if answer is None or answer["type"] == "elsewhere":
        return None
    if answer["type"] == "error":
        return _fail(answer)
    run = ContainerRun(answer["runtime"], interactive=answer["interactive"], terminal=False, watch_output=False)
    mounted = monotonic()
    outcome = run.run(answer["id"], answer["bundle"])
    # Nothing is mounted any more when this process has ended; the rest of the cleaning up it need not wait for.
    path, facts = answer["report"], ""
    if path:
        seconds = f'"mounted_s": {mounted - began}, "total_s": {outcome.ended - began}'
        facts = f', "report": {{"exit_code": {outcome.exit_code}, {seconds}}}'
    last = _ask(f'{{"op": "ended", "id": "{answer["id"]}"{facts}}}\n'.encode())
    if path:
        if last is None or last["type"] != "ended":
            return _fail(last or _GONE)
        return _write(path, last["report"]) or outcome.exit_code
    return outcome.exit_code


def _status(words: list[str]) -> int | None:
    """Write what the daemon has to show; None when it has not all of it."""
    if not words and _has_nothing():
        return _print("nothing is mounted\n")
    answer = _ask(_request("show", words), _STATUS_TIMEOUT_S)
    return None if answer is None or answer["type"] != "shown" else _print(answer["text"])


def _has_nothing() -> bool:
    """Whether the run directory has no mount and no daemon, nor anything that one has left behind.

    Settings that may be wrong are the command's to read, though nothing follows from them.
    """
    if any(name.startswith("VENEER_") and name not in _DIRECTORIES for name in os.environ):
        return False
    run_dir = _run_dir()
    return _names(run_dir) <= _QUIET and _names(f"{run_dir}/mounts") <= _LOCKS


def _names(directory: str) -> set[str]:
    """What is in a directory of ours; a name that nobody knows where others may write, or it cannot be read."""
    try:
        status = os.stat(directory)
        return {""} if status.st_uid or status.st_mode & 0o022 else set(os.listdir(directory))
    except FileNotFoundError:
        return set()
    except OSError:
        return {""}


def _print(text: str) -> int:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        return _UNREAD
    return 0


def _write(path: str, text: str) -> int:
    """Write the report of a run; an exit status other than 0 if that fails."""
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        from veneer.errors import UsageError

        return _tell(UsageError(f"cannot write the report {path}: {error.strerror}"))
    return 0


def _ask(request: bytes, timeout_s: float | None = None) -> "dict[str, Any] | None":
    """The daemon's answer; None when there is no daemon, or it has just gone. Notices before it are shown."""
    connection = socket(AF_UNIX, SOCK_STREAM)
    try:
        connection.connect(os.path.join(_run_dir(), _SOCKET))
        connection.sendall(request)
        data = bytearray()
        while True:
            while (end := data.find(b"\n")) < 0:
                # A daemon that has gone says nothing more, either.
                if not wait_readable(connection.fileno(), timeout_s) or not (chunk := connection.recv(_CHUNK)):
                    return None
                data += chunk
            answer: dict[str, Any]
            answer = make_scanner(_Scanning())(data[:end].decode(), 0)[0]  # type: ignore[arg-type]
            if answer["type"] not in _EVENTS:
                return answer
            del data[: end + 1]
            _show(answer)
    except OSError:
        return None
    finally:
        connection.close()


def _run_dir() -> str:
    return os.environ.get("VENEER_RUN_DIR") or "/run/veneer"


def _show(event: "dict[str, Any]") -> None:
    """An event before the answer; of progress, what a terminal can show in one line."""
    if event["type"] == "notice":
        os.write(2, f"note: {event['message']}\n".encode(errors="replace"))
    elif event["total"] and os.isatty(2):
        end = "\r\x1b[K" if event["done"] == event["total"] else "\r"
        os.write(
            2, f"\r{event['task']} {event['item']}: {event['done'] * 100 // event['total']} %{end}".encode()
        )


def _request(op: str, words: list[str]) -> bytes:
    environ = {k: v for k, v in os.environ.items() if k in _NAMES or k.startswith(_PREFIXES)}
    text = encode_basestring_ascii
    names = ", ".join(f"{text(name)}: {text(value)}" for name, value in environ.items())
    asked = ", ".join(map(text, words))
    return f'{{"op": "{op}", "words": [{asked}], "environ": {{{names}}}, "pid": {os.getpid()}}}\n'.encode()


class _Scanning:
    """What a scanner of JSON asks its decoder for."""

    strict = True
    object_hook = object_pairs_hook = parse_constant = None
    parse_float, parse_int = float, int
    memo: "dict[str, str]" = {}  # noqa: RUF012 - made and used once


def _fail(answer: "dict[str, Any]") -> int:
    from veneer.daemon.failure import error_from_json

    return _tell(error_from_json(answer))


def _tell(error: "VeneerError") -> int:
    from veneer.cli.render import Output

    Output().fail(error)
    return error.exit_code
