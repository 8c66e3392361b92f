"""``veneer run``: a command in a container on a lazily mounted image."""

import json
from pathlib import Path
from typing import Unpack

import click

from veneer.cli.backend import backend_option, with_backend
from veneer.cli.command import EXIT_STATUS, Invocation, command
from veneer.cli.container import ContainerArguments, container_options, options_of
from veneer.cli.render import size_text
from veneer.errors import UsageError

__all__ = ["run"]

_EXIT_STATUS = EXIT_STATUS.replace("0 success", "that of the command; before it runs:\n ", 1)


@click.command(epilog=_EXIT_STATUS)
@command
@click.argument("image")
@container_options
@backend_option
@click.option("--runtime", metavar="NAME", help="OCI runtime; by default runc, then crun.")
@click.option("--timing", is_flag=True, help="Say at the end how long what took, and what was fetched.")
@click.option(
    "--report",
    "report_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write times, requests and bytes to FILE as JSON.",
)
def run(
    invocation: Invocation,
    image: str,
    backend: str | None,
    runtime: str | None,
    timing: bool,
    report_file: Path | None,
    **options: Unpack[ContainerArguments],
) -> int:
    """Run a command in a container on IMAGE; what it writes is thrown away.

    The command comes after two dashes: veneer run -e A=b IMAGE -- ls -l
    """
    from veneer.container.run import RunRequest, RunResult, run_image
    from veneer.daemon.mounts import clean_stale

    settings, output = with_backend(invocation.settings, backend), invocation.output
    request = RunRequest(image, options_of(options), runtime, timing)

    async def work() -> RunResult:
        await clean_stale(settings.run_dir.absolute())
        with output.reporting() as report:
            return await run_image(request, settings, report=report)

    result = invocation.run(work)
    if report_file is not None:
        try:
            report_file.write_text(json.dumps(result.to_json(), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write the report {report_file}: {error.strerror}") from error
    if timing:
        first = "none" if result.first_output_s is None else f"after {result.first_output_s:.2f} s"
        output.say(
            f"mounted by {result.backend.backend} after {result.mounted_s:.2f} s, first output {first}, "
            f"ended after {result.total_s:.2f} s; {result.requests} requests, {size_text(result.bytes_fetched)}"
        )
    return result.exit_code
