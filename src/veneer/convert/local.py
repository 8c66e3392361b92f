"""``veneer pack`` and ``veneer profile static``: what this host makes for itself, next to its cache."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from veneer.convert.pack import BuiltPack, build_pack
from veneer.errors import CacheError, NotFound
from veneer.events import Reporter, silent
from veneer.image import Image, open_image
from veneer.image.packs import keep_local_pack
from veneer.image.profiles import kept_profile
from veneer.image.static import command_of, look
from veneer.prefetch.profile import DEFAULT_WORKLOAD, Profile, check_workload
from veneer.settings import Settings
from veneer.store.spanstore import open_store

__all__ = ["LocalPack", "make_local_pack", "make_static_profile", "pack_image"]


@dataclass(frozen=True, slots=True, eq=False)
class LocalPack:
    """A pack of this host, in ``directory``, for the image of that name."""

    image: str
    directory: Path
    pack: BuiltPack


async def make_local_pack(
    image_text: str,
    profile: Profile | None,
    settings: Settings,
    *,
    workload: str | None = None,
    report: Reporter = silent,
) -> LocalPack:
    """Make a pack, in place of an earlier one for the same workload.

    Args:
        image_text: reference of the image.
        profile: what to pack; None takes the one that is kept here for the workload.
        settings: where the cache is.
        workload: what it is for; None takes the profile's word.
        report: notices about the image.

    Raises:
        UsageError: the profile is of something else.
        NotFound: there is no profile here.
        CacheError: it cannot be kept.
        VeneerError: as opening and reading an image do.
    """
    cache_dir = settings.cache_dir
    async with open_image(image_text, settings, report=report) as image:
        digest = image.manifest.digest
        if profile is None:
            profile = await trio.to_thread.run_sync(
                kept_profile, cache_dir, digest, workload or DEFAULT_WORKLOAD
            )
        profile = replace(profile, workload=workload or profile.workload)
        (pack,) = await pack_image(image, settings, [profile])
        try:
            keep = partial(keep_local_pack, static=pack.static)
            directory = await trio.to_thread.run_sync(
                keep, cache_dir, digest, pack.workload, pack.index, pack.data
            )
        except OSError as error:
            raise CacheError(f"cannot keep the pack: {error.filename}: {error.strerror}") from error
        return LocalPack(image.name, directory, pack)


async def make_static_profile(
    image_text: str,
    words: Sequence[str],
    settings: Settings,
    *,
    workload: str = DEFAULT_WORKLOAD,
    report: Reporter = silent,
) -> Profile:
    """The static profile of an image for a command, read through the cache of the settings.

    Args:
        image_text: reference of the image.
        words: the command, in place of the image's Cmd; () for that.
        settings: where the cache is.
        workload: what to call it.
        report: notices about the image.

    Raises:
        NotFound: the image has no such command.
        VeneerError: as opening and reading an image do.
    """
    check_workload(workload)
    async with open_image(image_text, settings, report=report) as image, open_store(settings) as store:
        pairs = zip(image.devices, image.sources, strict=True)
        attached = [store.attach(device, source) for device, source in pairs]
        command = command_of(image.config, words)
        digest = image.manifest.digest
        profile = await look(await image.load(), store, attached, command, workload=workload, image=digest)
        name = image.name
    if not profile.uses:
        raise NotFound(
            f"nothing can be told of {shlex.join(profile.command) or 'no command'} in {name}",
            hint="give a program that the image has: veneer profile static IMAGE -- CMD",
        )
    return profile


async def pack_image(image: Image, settings: Settings, profiles: Sequence[Profile]) -> list[BuiltPack]:
    """A pack for each profile; the bytes come through the cache of the settings."""
    packs: list[BuiltPack] = []
    async with open_store(settings) as store:
        pairs = zip(image.devices, image.sources, strict=True)
        attached = [store.attach(device, source) for device, source in pairs]
        packs += [await build_pack(image, store, attached, profile) for profile in profiles]
    return packs
