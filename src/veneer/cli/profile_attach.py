"""``veneer profile attach``: profiles where the image is."""

from pathlib import Path

from veneer.cli.command import Command, CommonArguments, Invocation
from veneer.cli.parser import Parser, existing_file
from veneer.cli.profile_files import read_given

__all__ = ["ATTACH"]


class AttachArguments(CommonArguments):
    """What ``veneer profile attach`` takes."""

    image: str
    file: tuple[Path, ...]


def add_attach_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("IMAGE")
    parser.add_word("FILE", type=existing_file, repeated=True)


def attach(invocation: Invocation, args: AttachArguments) -> int:
    """Push the profiles in FILEs to the registry of IMAGE, as an artifact that refers to it.

    The image stays as it is. Without a FILE it is all profiles that are kept here for the image. Whoever
    mounts the image without a recorded pack fetches first what the profile of the workload says.
    """
    from veneer.convert.attach import attach_profiles
    from veneer.image.open import resolve_image
    from veneer.image.profiles import kept_profile, kept_workloads
    from veneer.oci.digest import Digest

    settings = invocation.settings
    profiles = [read_given(path) for path in args.file]
    if not profiles:

        async def find() -> Digest:
            async with resolve_image(args.image, settings) as (resolved, _):
                return resolved.manifest.digest

        image = invocation.run(find)
        names = kept_workloads(settings.cache_dir, image) or ["default"]
        profiles = [kept_profile(settings.cache_dir, image, name) for name in names]
    done = invocation.run(lambda: attach_profiles(args.image, profiles, settings))
    invocation.output.result(
        {"image": str(done.image), "artifact": str(done.artifact), "workloads": list(done.workloads)},
        f"attached the profiles of {', '.join(done.workloads)} to {done.image} as {done.artifact}",
    )
    return 0


ATTACH = Command(attach, AttachArguments, add_attach_arguments)
