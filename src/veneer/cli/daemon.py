"""``veneer daemon``: the resident process that serves mounts."""

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser
from veneer.errors import UsageError

__all__ = ["COMMAND"]

ACTIONS = ("run", "start", "stop", "restart")


class Arguments(CommonArguments):
    """What ``veneer daemon`` takes."""

    action: str
    idle_exit: float | None
    force: bool


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("ACTION", type=_action, default=ACTIONS[0])
    add = parser.add_argument
    add("--idle-exit", type=float, metavar="SECONDS", help="End after so long without a mount.")
    add("--force", action="store_true", help="With stop: detach what is mounted.")


def _action(text: str) -> str:
    if text not in ACTIONS:
        raise UsageError(f"unknown action {text!r}", hint=f"one of {', '.join(ACTIONS)}")
    return text


def run(invocation: Invocation, args: Arguments) -> int:
    """Serve mounts: run in the foreground (for a service manager), start in the background, stop, or restart.

    veneer mount and veneer run start it when it is missing, to end after ten minutes without a mount.
    A restart, as after an upgrade, disturbs neither mounts nor containers: reads wait for the next worker.
    stop refuses while anything is mounted, unless it is forced to detach it.
    """
    from veneer.daemon import lifecycle

    run_dir, output = invocation.settings.run_dir.absolute(), invocation.output
    if args.action == "run":
        lifecycle.become_daemon(run_dir, idle_exit_s=args.idle_exit)
    elif args.action == "start":
        started = lifecycle.start_daemon(run_dir, idle_exit_s=args.idle_exit)
        output.result({"started": started}, "" if started else "it runs already")
    elif args.action == "stop":
        stopped = lifecycle.stop_daemon(run_dir, force=args.force)
        output.result({"stopped": stopped}, "" if stopped else "it does not run")
    else:
        lifecycle.restart_daemon(run_dir)
        output.result({"restarted": True}, "")
    return 0


COMMAND = Command(run, Arguments, add_arguments)
