"""What sizes, levels and orders cost: every way is tried on the real bytes, and a start computed for it.

Sizes and processor times are measured. Times of starts are computed (:mod:`veneer.lab.model`) from the trace
that a profile is, for lines of any length; so a whole sweep takes less time than a few starts. One thing varies
at a time, the others are as they are by default.
"""

from collections.abc import Sequence
from pathlib import Path

import trio
import zstandard

from veneer.events import Reporter, silent
from veneer.image import Image
from veneer.lab.machine import environment_of
from veneer.lab.records import Network
from veneer.lab.sweep_layers import sweep_layers, sweep_streams
from veneer.lab.sweep_packs import sweep_packs
from veneer.lab.sweep_record import SWEEP_SCHEMA, Sweep, Trial
from veneer.lab.sweep_subject import read_subject
from veneer.prefetch.profile import Profile
from veneer.store.spanstore import SpanStore

__all__ = ["swept"]


async def swept(
    image: Image,
    profile: Profile,
    store: SpanStore,
    networks: Sequence[Network],
    directory: Path,
    *,
    what: str = "all",
    think: float = 1.0,
    sample: int = 1,
    command: Sequence[str] = (),
    report: Reporter = silent,
) -> Sweep:
    """Sweep over the layers of an image that a profile is about.

    Args:
        image: has an index.
        profile: of a start of it.
        store: where the layers are read through; all of them is.
        networks: that starts are computed for.
        directory: what the machine's disk is told by.
        what: ``layers``, ``packs`` or ``all``.
        think: factor of the pauses that the profile says.
        sample: compress one of so many spans that the start does not need.
        command: the command line, for the record.
        report: progress.

    Raises:
        UsageError: the profile is of another image, or there is more than fits into memory.
        VeneerError: as reading does.
    """
    attached = [store.attach(*pair) for pair in zip(image.devices, image.sources, strict=True)]
    subject = await read_subject(image, profile, store, attached, think=think, report=report)

    def try_all() -> tuple[Trial, ...]:
        trials: list[Trial] = []
        if what != "packs":
            trials += sweep_streams(subject, networks)
            trials += sweep_layers(subject, networks, sample=sample, report=report)
        if what != "layers":
            trials += sweep_packs(subject, networks, report=report)
        return tuple(trials)

    trials = await trio.to_thread.run_sync(try_all)
    about = environment_of(
        directory,
        command=command,
        seed=0,
        blocks={},
        images=[str(image.reference)],
        systems=[],
        networks=networks,
    )
    return Sweep(
        schema=SWEEP_SCHEMA,
        began=about.began,
        command=about.command,
        commit=about.commit,
        machine=f"{about.machine.cpu}, kernel {about.machine.kernel}",
        image=str(image.reference),
        digest=str(image.manifest.digest),
        workload=profile.workload,
        uses=len(profile.uses),
        needed=profile.size,
        think_s=sum(touch.think_s for touch in subject.touches),
        size=sum(map(len, subject.layers.values())),
        networks=tuple(networks),
        versions={"veneer": about.versions["veneer"], "zstd": ".".join(map(str, zstandard.ZSTD_VERSION))},
        trials=trials,
    )
