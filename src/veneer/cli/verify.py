"""``veneer verify``: every byte of an image against everything that is stated about it."""

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser
from veneer.cli.render import size_text

__all__ = ["COMMAND"]


class Arguments(CommonArguments):
    """What ``veneer verify`` takes."""

    image: str


def add_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")


def run(invocation: Invocation, args: Arguments) -> int:
    """Check every byte of IMAGE: blobs, spans, diffIDs, packs, and whether the index describes the layers.

    Everything that is wrong is listed, and the exit status is 20 then.
    """
    from veneer.image import open_image
    from veneer.verify import VerifyReport, verify_image

    async def work() -> VerifyReport:
        with invocation.output.reporting() as report:
            async with open_image(args.image, invocation.settings, report=report) as opened:
                return await verify_image(opened, report, cache_dir=invocation.settings.cache_dir)

    verdict = invocation.run(work)
    lines = []
    for layer in verdict.layers:
        judgement = "ok" if not layer.problem_count else f"{layer.problem_count} problems"
        blob = layer.device.blob
        lines.append(f"{blob.digest}: {layer.spans} spans, {size_text(blob.size)}: {judgement}")
        lines += [f"  {problem}" for problem in layer.problems]
    for pack in verdict.packs:
        judgement = "ok" if not pack.problem_count else f"{pack.problem_count} problems"
        lines.append(
            f"pack of the workload {pack.workload}, {pack.origin}: {size_text(pack.size)}: {judgement}"
        )
        lines += [f"  {problem}" for problem in pack.problems]
    lines += verdict.problems
    lines.append(f"{verdict.image}: {'ok' if verdict.ok else 'NOT ok'}")
    invocation.output.result(verdict.to_json(), "\n".join(lines))
    return verdict.exit_code


COMMAND = Command(run, Arguments, add_arguments)
