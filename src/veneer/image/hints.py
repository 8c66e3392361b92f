"""What is known of a start without a pack: profiles of this host, by layer, and those attached to the image.

An attached profile is a small artifact that refers to the image (docs/reference/profile-format.md). Whether an
image has some is asked once, and the answer, also that there is none, is good for :data:`FRESH_S`.

A profile is a hint: its ranges are fetched as spans and verified as usual, so one that is stale, wrong or
corrupt costs time and nothing else.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import trio

from veneer.errors import CacheError, IntegrityError, NotFound, UnsupportedFormat
from veneer.image.by_layer import images_knowing
from veneer.image.contents import Contents
from veneer.image.profiles import kept_profile
from veneer.oci.canonical import canonical_json, parse_json
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import Manifest, parse_manifest
from veneer.oci.mediatypes import (
    ANNOTATION_CREATED,
    ANNOTATION_WORKLOAD,
    VENEER_PROFILE,
    VENEER_PROFILE_ARTIFACT,
)
from veneer.prefetch.profile import DEFAULT_WORKLOAD, MAX_PROFILE_SIZE, Profile, Use

__all__ = ["FRESH_S", "Hint", "attached_hint", "attached_profiles", "known_hint"]

log = logging.getLogger(__name__)

#: How long it is believed which profiles are attached to an image.
FRESH_S: Final = 3600.0
#: Profiles that are looked at: of other images, or attached to one.
_MOST_KNOWN: Final = 4
_MOST_ATTACHED: Final = 64
_MOST_NOTE: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class Hint:
    """A profile for an image, all of it about layers that the image has.

    Args:
        origin: ``host`` or ``attached``.
        images: digests of the manifests that the parts of it were kept for.
        profile: what is read.
    """

    origin: str
    images: tuple[str, ...]
    profile: Profile


def known_hint(
    cache_dir: Path, layers: Sequence[Digest], workload: str, words: Sequence[str] = ()
) -> Hint | None:
    """What this host knows of the layers of an image. Blocks.

    Of several profiles the one of the same command comes first, then the one that has most. What others know of
    layers that it does not know is added.

    Args:
        cache_dir: where profiles are kept.
        layers: diffIDs.
        workload: what is started.
        words: the command.
    """
    profiles = []
    for image in images_knowing(cache_dir / "profiles", reversed(layers), workload)[:_MOST_KNOWN]:
        try:
            profile = kept_profile(cache_dir, image, workload).restricted(layers)
        except (NotFound, CacheError, IntegrityError, UnsupportedFormat) as error:
            log.info("profile of=%s is not used cause=%r", image, error.message)
            continue
        if profile.uses:
            profiles.append((profile.command == tuple(words), not profile.static, profile.size, image, profile))
    profiles.sort(key=lambda one: one[:3], reverse=True)
    uses: list[Use] = []
    images: list[str] = []
    covered: set[Digest] = set()
    for _, _, _, image, profile in profiles:
        more = [use for use in profile.uses if use.layer not in covered]
        if more:
            uses += more
            images.append(str(image))
            covered.update(profile.layers)
    if not uses:
        return None
    return Hint("host", tuple(images), replace(profiles[0][-1], uses=tuple(uses)))


async def attached_hint(
    contents: Contents, manifest: Manifest, layers: Iterable[Digest], cache_dir: Path, workload: str
) -> Hint | None:
    """The profile of a workload that is attached to an image, if there is one for its layers.

    Raises VeneerError when it cannot be had, or is none.
    """
    for descriptor in await attached_profiles(contents, manifest, cache_dir):
        if descriptor.annotations.get(ANNOTATION_WORKLOAD, DEFAULT_WORKLOAD) != workload:
            continue
        data = await contents.fetch(descriptor, f"profile of {workload}", MAX_PROFILE_SIZE)
        profile = await trio.to_thread.run_sync(Profile.parse, data)
        profile = profile.restricted(layers)
        return Hint("attached", (str(manifest.digest),), profile) if profile.uses else None
    return None


async def attached_profiles(
    contents: Contents, manifest: Manifest, cache_dir: Path, *, fresh: bool = False
) -> list[Descriptor]:
    """The profiles that refer to an image, the latest of each workload, with the names of these.

    Args:
        contents: of the image's repository.
        manifest: of the image.
        cache_dir: where the answer is kept.
        fresh: ask in any case.

    Raises VeneerError.
    """
    path = cache_dir / "profiles" / "attached" / f"{manifest.digest.hex}.json"
    if not fresh and (known := await trio.to_thread.run_sync(_noted, path)) is not None:
        return known
    artifacts: list[Manifest] = []
    referrers = await contents.repository.referrers(manifest.digest, VENEER_PROFILE_ARTIFACT)
    for referrer in referrers[:_MOST_ATTACHED]:
        try:
            artifact = parse_manifest(
                await contents.manifest(referrer, "attached profile"), referrer.media_type
            )
        except (NotFound, IntegrityError, UnsupportedFormat) as error:
            log.warning("referrer=%s is not used cause=%r", referrer.digest, error.message)
            continue
        if isinstance(artifact, Manifest) and artifact.subject and artifact.subject.digest == manifest.digest:
            artifacts.append(artifact)
    artifacts.sort(key=lambda artifact: artifact.annotations.get(ANNOTATION_CREATED, ""))
    found = {
        layer.annotations.get(ANNOTATION_WORKLOAD, DEFAULT_WORKLOAD): layer
        for artifact in artifacts
        for layer in artifact.layers
        if layer.media_type == VENEER_PROFILE
    }
    profiles = list(found.values())
    await trio.to_thread.run_sync(_note, path, profiles)
    return profiles


def _noted(path: Path) -> list[Descriptor] | None:
    """What was found before, if that is not too long ago."""
    try:
        with path.open("rb") as file:
            note = parse_json(file.read(_MOST_NOTE + 1), "note of attached profiles", limit=_MOST_NOTE)
        match note:
            case {"asked": int(asked) | float(asked), "profiles": list(profiles)}:
                if 0 <= time.time() - asked < FRESH_S:
                    return [Descriptor.from_json(one, "attached profile") for one in profiles]
    except (OSError, IntegrityError):
        # Asked again.
        return None
    return None


def _note(path: Path, profiles: Sequence[Descriptor]) -> None:
    data = canonical_json({"asked": int(time.time()), "profiles": [one.to_json() for one in profiles]})
    new = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(data)
        new.replace(path)
    except OSError as error:
        log.info("cannot note which profiles are attached cause=%r", str(error))
