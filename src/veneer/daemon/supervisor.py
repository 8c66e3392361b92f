"""The daemon's first process: ``python -m veneer.daemon.supervisor RUN_DIR``.

It makes the run directory, the socket and the fanotify group, or takes over those that the service manager or
another supervisor has, and then is the primary (:mod:`veneer.daemon.primary`).

Invariant: one ``ready``, ``running`` or ``error`` line on standard output, unless it is killed before.
"""

import os
import sys
import time
from collections.abc import Sequence

from veneer.daemon import instance, systemd
from veneer.daemon.held import SUPERVISOR, WATCHDOG_S, Held
from veneer.daemon.myself import EXIT_ERROR, error_message, keep_to_myself, let_go_of, log, protect, say
from veneer.daemon.primary import GROUP, WORKER, Supervisor
from veneer.mount import fanotify

__all__ = ["main"]

#: What the socket is called where the service manager makes it.
_CONTROL = "control"
_EXIT_USAGE = 2
_USAGE = "usage: supervisor RUN_DIR [--idle-exit SECONDS] [--watchdog SECONDS] [--background]"
_VALUED = ("--idle-exit", "--watchdog", "--adopt", "--resume")


def main(
    arguments: Sequence[str], program: Sequence[str] = SUPERVISOR, worker_program: Sequence[str] = WORKER
) -> int:
    """Run a daemon; returns its exit code.

    It says one JSON line on standard output: ``{"type": "ready"}``; ``{"type": "running"}`` when this run
    directory has a daemon, then it exits with 0; or ``{"type": "error"}`` with ``code``, ``message``, ``hint``.
    With ``--background`` the process that was started ends at once and leaves the daemon behind, which writes
    to ``daemon.log`` and lets go of standard output after its line.

    Args:
        arguments: see the usage. ``--adopt`` and ``--resume`` are for supervisors to call each other.
        program: executes this function with the arguments that follow it.
        worker_program: the same for the worker.
    """
    options: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name = word if word.startswith("--") else "run_dir"
        if name in options or (name not in ("run_dir", "--background", *_VALUED)):
            options.clear()
            break
        options[name] = next(words, "") if name in _VALUED else word
    if "run_dir" not in options:
        sys.stderr.write(_USAGE + "\n")
        return _EXIT_USAGE
    run_dir = os.path.abspath(options["run_dir"])
    if ("--background" in options or "--adopt" in options) and os.fork():
        # The caller waits for this process; init inherits the daemon.
        os._exit(0)
    handover = options.get("--adopt") or options.get("--resume")
    try:
        held = Held.from_json(handover) if handover else _begin(run_dir, options)
    except (OSError, instance.RefusedRunDirectory) as error:
        text = f"{error.strerror}: {error.filename or run_dir}" if isinstance(error, OSError) else str(error)
        say(error_message(text, instance.HINT))
        return EXIT_ERROR
    if held is None:
        say({"type": "running"})
        return 0
    keep_to_myself(held.descriptors)
    os.chdir("/")
    if "--adopt" in options:
        os.setsid()
        protect()
        log("WARNING", f"both supervisors died, another one adopts worker={held.worker and held.worker[0]}")
    return Supervisor(run_dir, held, program, worker_program).run()


def _begin(run_dir: str, options: dict[str, str]) -> Held | None:
    """All that a daemon holds; None when there is a daemon."""
    lock = instance.lock(run_dir)
    if lock is None:
        return None
    background = "--background" in options
    if background:
        _log_to(os.path.join(run_dir, instance.LOG))
        os.setsid()
        let_go_of(0)
    manager = systemd.take_environment()
    listener = manager.fds.get(_CONTROL)
    group, kept = _group(manager)
    return Held(
        listener=instance.listen(run_dir).detach() if listener is None else listener,
        lock=lock,
        group=group,
        group_used=kept,
        own_socket=listener is None,
        idle_exit=options.get("--idle-exit", "none"),
        watchdog_s=float(options.get("--watchdog", WATCHDOG_S)),
        started=time.time(),
        address=manager.address,
        manager_watchdog_s=manager.watchdog_s,
        oom_score_adj=protect(),
        background=background,
    )


def _group(manager: systemd.Manager) -> tuple[int | None, bool]:
    """The fanotify group, and whether the service manager kept it while the whole daemon was dead."""
    kept = manager.fds.get(GROUP)
    if kept is not None:
        orphans = fanotify.sweep(kept, fanotify.MAX_DESCRIPTORS)  # whatever limit its readers had
        log("WARNING", f"taking back the group that the service manager kept events_failed={orphans}")
        return kept, True
    try:
        group = fanotify.open_group()
    except OSError as error:
        log(
            "WARNING",
            f"no fanotify group, devices cannot be filled by the kernel's events cause={error.strerror!r}",
        )
        return None, False
    try:
        systemd.notify(manager.address, "FDSTORE=1", f"FDNAME={GROUP}", "FDPOLL=0", fds=[group])
    except OSError as error:
        log("WARNING", f"the service manager does not keep the group cause={error.strerror!r}")
    return group, False


def _log_to(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.dup2(fd, 2)
    os.close(fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
