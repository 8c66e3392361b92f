"""How a worker gets itself a new supervisor when the two that it had are dead.

Standard library only, so that it works whatever state the worker is in.
"""

import os
import socket
import subprocess
from collections.abc import Sequence

from veneer.daemon.held import STATE_VARIABLE, SUPERVISOR, Held

__all__ = ["start_adopting_supervisor"]


def start_adopting_supervisor(
    run_dir: str | os.PathLike[str],
    group: int | None,
    listener: int,
    lock: int,
    idle_exit: str,
    *,
    program: Sequence[str] = SUPERVISOR,
) -> socket.socket:
    """For a worker whose supervisors have died, which it knows from the end of their socket: start another one.

    The new supervisor takes the worker as it is, and starts a standby. Returns what replaces the socket. Blocks
    until a process has started; an event loop calls this in a thread. Raises OSError: try again later.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        myself = os.pidfd_open(os.getpid())
        try:
            text = os.environ.get(STATE_VARIABLE)
            known = Held.from_json(text) if text else Held(listener, lock)
            held = known._replace(
                listener=listener,
                lock=lock,
                group=group,
                group_used=True,
                worker=(os.getpid(), myself, theirs.fileno()),
                idle_exit=idle_exit,
            )
            # It leaves a child behind, which is the supervisor.
            subprocess.run(
                [*program, os.fspath(run_dir), "--adopt", held.to_json()],
                pass_fds=held.descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                check=True,
            )
        except subprocess.CalledProcessError as error:
            ours.close()
            raise ChildProcessError(f"the supervisor did not start: {error}") from error
        except OSError:
            ours.close()
            raise
        finally:
            os.close(myself)
    return ours
