"""``veneer profile``: learning what a start reads, and looking after what was learnt."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.backend import add_backend_argument, with_backend
from veneer.cli.command import EXIT_STATUS, Command, CommonArguments, Invocation, group_of
from veneer.cli.container import ContainerArguments, options_of
from veneer.cli.parser import Parser, existing_file
from veneer.cli.profile_attach import ATTACH
from veneer.cli.profile_files import (
    add_output,
    add_workload,
    amount_text,
    put_out,
    read_given,
    write_profile,
)
from veneer.cli.profile_static import STATIC
from veneer.cli.render import path_json, printable, size_text, table
from veneer.errors import UsageError, VeneerError
from veneer.events import Notice

if TYPE_CHECKING:
    from veneer.image.profiles import FileUse
    from veneer.oci.digest import Digest
    from veneer.prefetch.profile import Profile

__all__ = ["COMMAND"]

_EXIT_STATUS = EXIT_STATUS.replace("0 success", "that of the command; before it runs, and after:\n ", 1)


class RecordArguments(ContainerArguments):
    """What ``veneer profile record`` takes."""

    image: str
    backend: str | None
    runtime: str | None
    workload: str
    merge: bool
    output: Path | None


def add_record_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    RecordArguments.add_container(parser)
    add_backend_argument(parser)
    parser.add_argument("--runtime", metavar="NAME", help="OCI runtime; by default runc, then crun.")
    add_workload(parser)
    parser.add_argument("--merge", action="store_true", help="Merge it with the profile that is kept here.")
    add_output(parser, "Write it to FILE as well.")


def record(invocation: Invocation, args: RecordArguments) -> int:
    """Run a command in a container on IMAGE, and keep the profile of what it reads.

    The command comes after two dashes: veneer profile record IMAGE -- ls -l. A server is recorded until
    it is interrupted. Takes the backend erofs-fanotify. What other mounts read meanwhile of layers that
    they share with IMAGE is recorded, too.
    """
    from veneer.daemon.client import RunRequest
    from veneer.daemon.recording import record_image
    from veneer.image.profiles import keep_profile, kept_profile, kept_workloads
    from veneer.oci.digest import Digest
    from veneer.prefetch.profile import merge_profiles

    settings, output = with_backend(invocation.settings, args.backend), invocation.output
    request = RunRequest(args.image, options_of(args), args.runtime)
    with output.reporting() as report:
        result, profile = record_image(request, settings, args.workload, report=report)
    image = Digest.parse(result.mount.digest)
    if args.merge and args.workload in kept_workloads(settings.cache_dir, image):
        profile = merge_profiles([kept_profile(settings.cache_dir, image, args.workload), profile])
    keep_profile(settings.cache_dir, image, profile)
    if args.output is not None:
        write_profile(args.output, profile)
    output.say(f"recorded {amount_text(profile)} as workload {profile.workload} of {image}")
    return result.exit_code


class ShowArguments(CommonArguments):
    """What ``veneer profile show`` takes."""

    profile: str
    workload: str
    image: str | None


def add_show_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("PROFILE")
    add_workload(parser)
    parser.add_argument("--image", metavar="IMAGE", help="Whose files to name, when PROFILE is a file.")


def show(invocation: Invocation, args: ShowArguments) -> int:
    """Show what a profile says: how much of which layers is used, and of which files.

    PROFILE is a file, or an IMAGE whose profile is kept here. The image's other workloads are named, too.
    """
    from veneer.image.open import load_image, resolve_image
    from veneer.image.profiles import files_used, kept_profile, kept_workloads

    settings, path = invocation.settings, Path(args.profile)
    given = read_given(path) if path.is_file() else None
    image = args.profile if given is None else args.image

    names: list[str] = []

    async def look(image: str) -> "tuple[Profile, list[FileUse] | None]":
        with invocation.output.reporting() as report:
            async with resolve_image(image, settings) as (resolved, stats):
                digest = resolved.manifest.digest
                found = given or kept_profile(settings.cache_dir, digest, args.workload)
                names.extend(kept_workloads(settings.cache_dir, digest))
                try:
                    opened = await load_image(resolved, settings, stats, report)
                    return found, files_used(await opened.load(), found)
                except VeneerError as error:
                    report(Notice(f"cannot tell which files: {error.message}"))
                    return found, None

    profile, files = (given, None) if image is None else invocation.run(partial(look, image))
    if profile is None:
        raise AssertionError("without a file it is an image")
    invocation.output.result(_document(profile, files, names), _text(profile, files, names))
    return 0


class MergeArguments(CommonArguments):
    """What ``veneer profile merge`` takes."""

    file: tuple[Path, ...]
    workload: str | None
    output: Path | None


def add_merge_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("FILE", type=existing_file, repeated=True)
    parser.add_argument("--workload", metavar="NAME", help="What to call the result; by default as they are.")
    add_output(parser, "Write to FILE, not to standard output.")


def merge(invocation: Invocation, args: MergeArguments) -> int:
    """Merge profiles of several runs into one: what any of them used, in the order of the median run."""
    from veneer.prefetch.profile import merge_profiles

    profiles = [read_given(path) for path in args.file]
    if args.workload is not None:
        profiles = [replace(profile, workload=args.workload) for profile in profiles]
    put_out(invocation, merge_profiles(profiles), args.output)
    return 0


class ExportArguments(CommonArguments):
    """What ``veneer profile export`` takes."""

    image: str
    workload: str
    output: Path | None


def add_export_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    add_workload(parser)
    add_output(parser, "Write to FILE, not to standard output.")


def export(invocation: Invocation, args: ExportArguments) -> int:
    """Print a profile that is kept here for IMAGE."""
    from veneer.image.open import resolve_image
    from veneer.image.profiles import kept_profile

    async def find() -> "Digest":
        async with resolve_image(args.image, invocation.settings) as (resolved, _):
            return resolved.manifest.digest

    image = invocation.run(find)
    put_out(invocation, kept_profile(invocation.settings.cache_dir, image, args.workload), args.output)
    return 0


class ImportArguments(CommonArguments):
    """What ``veneer profile import`` takes."""

    image: str
    file: Path
    workload: str | None


def add_import_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    parser.add_word("FILE", type=existing_file)
    parser.add_argument("--workload", metavar="NAME", help="What to call it here; by default as it is.")


def import_(invocation: Invocation, args: ImportArguments) -> int:
    """Keep the profile in FILE for IMAGE: as much of it as is about layers that IMAGE has."""
    from veneer.image.open import load_config, resolve_image
    from veneer.image.profiles import keep_profile

    given = read_given(args.file)

    async def find() -> "tuple[Digest, tuple[Digest, ...]]":
        async with resolve_image(args.image, invocation.settings) as (resolved, _):
            return resolved.manifest.digest, (await load_config(resolved)).diff_ids

    image, diff_ids = invocation.run(find)
    fitting = given.restricted(diff_ids)
    if not fitting.uses:
        raise UsageError(f"{args.file} is about none of the layers of {args.image}")
    profile = replace(fitting, image=str(image), workload=args.workload or given.workload)
    keep_profile(invocation.settings.cache_dir, image, profile)
    if (left := len(given.layers) - len(fitting.layers)) > 0:
        invocation.output.say(f"note: left out {left} layers that {args.image} does not have")
    invocation.output.say(f"kept {amount_text(profile)} as workload {profile.workload} of {image}")
    return 0


# How profiles look


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a profile says of one layer."""

    diff_id: str
    ranges: int
    bytes: int
    first_ms: float
    last_ms: float
    longest_wait_ms: float


def _layers(profile: "Profile") -> list[_Layer]:
    out: list[_Layer] = []
    for layer in profile.layers:
        uses = profile.restricted([layer]).uses
        times = [use.first_ms for use in uses]
        longest = max(use.wait_ms for use in uses)
        size = sum(use.length for use in uses)
        out.append(_Layer(str(layer), len(uses), size, min(times), max(times), longest))
    return out


def _document(profile: "Profile", files: "list[FileUse] | None", workloads: Sequence[str]) -> dict[str, object]:
    return {
        "workload": profile.workload,
        "workloads": list(workloads),
        "image": profile.image,
        "command": list(profile.command),
        "origin": "static" if profile.static else "recorded",
        "runs": profile.runs,
        "ranges": len(profile.uses),
        "bytes": profile.size,
        "layers": [asdict(layer) for layer in _layers(profile)],
        "files": None
        if files is None
        else [
            path_json(b"/" + file.path) | {"size": file.size, "used": file.used, "first_ms": file.first_ms}
            for file in files
        ],
    }


def _text(profile: "Profile", files: "list[FileUse] | None", workloads: Sequence[str]) -> str:
    runs = "1 run" if profile.runs == 1 else f"{profile.runs} runs"
    how = "told from the files (static)" if profile.static else runs
    lines = [f"workload {profile.workload}, {how} of: {printable(shlex.join(profile.command))}"]
    lines += [f"image {profile.image}"] if profile.image else []
    others = [name for name in workloads if name != profile.workload]
    lines += [f"other workloads of the image: {', '.join(others)}"] if others else []
    rows: list[tuple[str, ...]] = [("LAYER", "RANGES", "BYTES", "FIRST", "LAST", "LONGEST WAIT")]
    for layer in _layers(profile):
        times = (f"{ms:.1f} ms" for ms in (layer.first_ms, layer.last_ms, layer.longest_wait_ms))
        rows.append((layer.diff_id[:19], str(layer.ranges), size_text(layer.bytes), *times))
    parts = ["\n".join(lines), table(rows)]
    if files is not None:
        listed = [
            (
                f"{file.first_ms:.1f} ms",
                size_text(file.used),
                size_text(file.size),
                printable((b"/" + file.path).decode(errors="backslashreplace")),
            )
            for file in files
        ]
        parts.append(table([("FIRST", "USED", "SIZE", "FILE"), *listed]))
    return "\n\n".join(parts)


COMMAND = group_of(
    "Learn what a start reads, so that it can be there before it is asked for.",
    {
        "record": Command(record, RecordArguments, add_record_arguments, _EXIT_STATUS),
        "static": STATIC,
        "attach": ATTACH,
        "show": Command(show, ShowArguments, add_show_arguments),
        "merge": Command(merge, MergeArguments, add_merge_arguments),
        "export": Command(export, ExportArguments, add_export_arguments),
        "import": Command(import_, ImportArguments, add_import_arguments),
    },
)
