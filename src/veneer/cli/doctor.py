"""``veneer doctor``: what works on this machine."""

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.render import table
from veneer.errors import MountError

__all__ = ["COMMAND"]


def run(invocation: Invocation, _args: CommonArguments) -> int:
    """Say what works on this machine and how to mend what does not. Fails if nothing can be mounted."""
    from veneer.daemon.doctor import examine

    checks = examine(invocation.settings)
    rows = [(check.status, check.name, check.detail + _hint(check.hint)) for check in checks]
    invocation.output.result([check.to_json() for check in checks], table(rows))
    return MountError.exit_code if any(check.status == "fail" for check in checks) else 0


def _hint(hint: str | None) -> str:
    return f" (hint: {hint})" if hint else ""


COMMAND = Command(run, CommonArguments)
