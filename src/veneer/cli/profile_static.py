"""``veneer profile static``: what a start will read, as far as the image's files tell."""

from pathlib import Path

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser
from veneer.cli.profile_files import add_output, add_workload, amount_text, write_profile
from veneer.errors import UsageError

__all__ = ["STATIC"]


class StaticArguments(CommonArguments):
    """What ``veneer profile static`` takes."""

    image: str
    workload: str
    output: Path | None
    arguments: tuple[str, ...]


def add_static_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    add_workload(parser)
    add_output(parser, "Write it to FILE as well.")
    parser.add_word("ARGUMENTS", repeated=True)


def static(invocation: Invocation, args: StaticArguments) -> int:
    """Keep a profile of IMAGE of what its files tell that a start will read. Nothing of the image is run.

    The command that is started is the image's own, or comes after two dashes in place of its Cmd: veneer
    profile static IMAGE -- python3 -m app. It may be anything that veneer run takes.
    """
    from veneer.convert.local import make_static_profile
    from veneer.image.profiles import keep_profile, kept_profile, kept_workloads
    from veneer.oci.digest import Digest

    settings, output = invocation.settings, invocation.output
    with output.reporting() as report:
        profile = invocation.run(
            lambda: make_static_profile(
                args.image, args.arguments, settings, workload=args.workload, report=report
            )
        )
    image = Digest.parse(profile.image)
    known = args.workload in kept_workloads(settings.cache_dir, image)
    if known and not kept_profile(settings.cache_dir, image, args.workload).static:
        raise UsageError(
            f"the workload {args.workload} of {image} has a profile that was recorded, which is better",
            hint="give another --workload, or record it again",
        )
    keep_profile(settings.cache_dir, image, profile)
    if args.output is not None:
        write_profile(args.output, profile)
    output.say(f"found {amount_text(profile)} as workload {profile.workload} of {image}")
    return 0


STATIC = Command(static, StaticArguments, add_static_arguments)
