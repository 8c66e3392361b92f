"""``veneer doctor``: what works on this machine."""

import click

from veneer.cli.command import EXIT_STATUS, Invocation, command
from veneer.cli.render import table
from veneer.errors import MountError

__all__ = ["doctor"]


@click.command(epilog=EXIT_STATUS)
@command
def doctor(invocation: Invocation) -> int:
    """Say what works on this machine and how to mend what does not. Fails if nothing can be mounted."""
    from veneer.daemon.doctor import examine

    checks = examine(invocation.settings)
    rows = [(check.status, check.name, check.detail + _hint(check.hint)) for check in checks]
    invocation.output.result([check.to_json() for check in checks], table(rows))
    return MountError.exit_code if any(check.status == "fail" for check in checks) else 0


def _hint(hint: str | None) -> str:
    return f" (hint: {hint})" if hint else ""
