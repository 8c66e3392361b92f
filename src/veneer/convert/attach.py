"""``veneer profile attach``: profiles as a small artifact that refers to an image, which stays as it is."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from veneer.errors import UsageError
from veneer.image.hints import attached_profiles
from veneer.image.open import load_config, resolve_image
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.oci.manifest import build_manifest
from veneer.oci.mediatypes import (
    ANNOTATION_CREATED,
    ANNOTATION_WORKLOAD,
    EMPTY_JSON,
    OCI_MANIFEST,
    VENEER_PROFILE,
    VENEER_PROFILE_ARTIFACT,
)
from veneer.prefetch.profile import Profile
from veneer.settings import Settings

__all__ = ["AttachedProfiles", "attach_profiles"]

_EMPTY = b"{}"


@dataclass(frozen=True, slots=True)
class AttachedProfiles:
    """What was attached.

    Args:
        image: digest of the image's manifest.
        artifact: digest of the manifest that refers to it.
        workloads: whose profiles it has.
    """

    image: Digest
    artifact: Digest
    workloads: tuple[str, ...]


async def attach_profiles(image_text: str, profiles: Sequence[Profile], settings: Settings) -> AttachedProfiles:
    """Push profiles to where an image is, as one referrer of it.

    Those of workloads that have been attached before take the place of these.

    Args:
        image_text: reference of the image.
        profiles: one a workload, as much of each as is about layers of the image.
        settings: how registries are spoken to.

    Raises:
        UsageError: there are two of one workload, or one that is about none of the layers.
        RegistryError: the registry does not take them.
    """
    names = [profile.workload for profile in profiles]
    if len(set(names)) != len(names):
        raise UsageError(
            f"two profiles are of one workload: {', '.join(names)}", hint="merge them: veneer profile merge"
        )
    async with resolve_image(image_text, settings) as (resolved, _):
        manifest, repository = resolved.manifest, resolved.contents.repository
        diff_ids = (await load_config(resolved)).diff_ids
        layers: list[Descriptor] = []
        for profile in profiles:
            fitting = profile.restricted(diff_ids)
            if not fitting.uses:
                raise UsageError(
                    f"the profile of {profile.workload} is about none of the layers of {image_text}"
                )
            data = replace(fitting, image=str(manifest.digest)).to_json()
            annotations = {ANNOTATION_WORKLOAD: profile.workload}
            layers.append(Descriptor(VENEER_PROFILE, Digest.of(data), len(data), annotations))
            await repository.push_blob(layers[-1], lambda data=data: io.BytesIO(data))  # type: ignore[misc]
        config = Descriptor(EMPTY_JSON, Digest.of(_EMPTY), len(_EMPTY))
        await repository.push_blob(config, lambda: io.BytesIO(_EMPTY))
        raw = build_manifest(
            config,
            layers,
            annotations={ANNOTATION_CREATED: datetime.now(UTC).isoformat(timespec="microseconds")},
            subject=manifest.descriptor,
            artifact_type=VENEER_PROFILE_ARTIFACT,
        )
        artifact = await repository.push_manifest(raw, OCI_MANIFEST)
        # This host need not wait for its answer of before to grow old.
        await attached_profiles(resolved.contents, manifest, settings.cache_dir, fresh=True)
    return AttachedProfiles(manifest.digest, artifact.digest, tuple(names))
