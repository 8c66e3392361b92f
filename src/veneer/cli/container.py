"""What ``veneer run`` and ``veneer bundle`` both take."""

from veneer.cli.command import CommonArguments
from veneer.cli.parser import Parser
from veneer.container.options import NETWORKS, ContainerOptions, parse_environment, parse_volume
from veneer.errors import UsageError

__all__ = ["ContainerArguments", "options_of"]


class ContainerArguments(CommonArguments):
    """How the container differs from what its image says, and the words of its command."""

    env: list[str]
    volume: list[str]
    user: str
    workdir: str
    entrypoint: str | None
    hostname: str
    network: str
    read_only: bool
    interactive: bool
    tty: bool
    arguments: tuple[str, ...]

    @staticmethod
    def add_container(parser: Parser) -> None:
        """Declare them."""
        add = parser.add_argument
        add(
            "-e",
            "--env",
            action="append",
            default=[],
            metavar="NAME[=VALUE]",
            help="Set or pass on a variable.",
        )
        add(
            "-v",
            "--volume",
            action="append",
            default=[],
            metavar="SRC:DST[:ro]",
            help="Show a path of the host.",
        )
        add("-u", "--user", default="", metavar="USER[:GROUP]", help="Run as; looked up in the image.")
        add("-w", "--workdir", default="", metavar="DIR", help="Working directory.")
        add("--entrypoint", metavar="COMMAND", help="In place of the image's entrypoint and command.")
        add("--hostname", default="", metavar="NAME", help="Host name in the container.")
        add(
            "--network",
            choices=NETWORKS,
            default="host",
            help="The host's network, or nothing but loopback. [default: %(default)s]",
        )
        add("--read-only", action="store_true", help="A root that cannot be written to.")
        add("-i", "--interactive", action="store_true", help="Connect standard input.")
        add("-t", "--tty", action="store_true", help="Give it a terminal.")
        parser.add_word("ARGUMENTS", repeated=True)


def options_of(given: ContainerArguments) -> ContainerOptions:
    """What the shared options say. Raises UsageError."""
    entrypoint = None
    if given.entrypoint is not None:
        import shlex

        try:
            entrypoint = tuple(shlex.split(given.entrypoint))
        except ValueError as error:
            raise UsageError(f"--entrypoint {given.entrypoint!r}: {error}") from error
    return ContainerOptions(
        arguments=given.arguments,
        entrypoint=entrypoint,
        environment=parse_environment(given.env),
        volumes=tuple(map(parse_volume, given.volume)),
        hostname=given.hostname,
        user=given.user,
        working_dir=given.workdir,
        network=given.network,
        terminal=given.tty,
        interactive=given.interactive,
        read_only=given.read_only,
    )
