"""Images that are open, and how to tell that one of them is what somebody asks for, without opening it again.

An image is remembered by what it was asked for with, and by the notes of this host that decide how it is opened
(:mod:`veneer.image.unchanged`). Where the registry need not be asked what a reference names, it is remembered
by that, too: then a look at a few small files is all that a second start needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from veneer.container.users import ContainerUser
from veneer.image import Image
from veneer.image.open import ResolvedImage
from veneer.image.tags import known_tag
from veneer.image.unchanged import Mark, can_be_told, mark_of
from veneer.mount.filetable import FileTable
from veneer.mount.packed import Packed
from veneer.oci.digest import Digest
from veneer.settings import Settings
from veneer.store.attached import AttachedDevice
from veneer.store.spanstore import SpanStore

__all__ = ["Asked", "Holding", "Identity", "OpenImages", "found", "identity"]

#: Of a cache directory's devices; None before there are any.
Identity = tuple[int, int] | None
#: Whether a store is the one for these settings, whose cache directory is really there, and is this one.
IsStore = Callable[[SpanStore, Settings, Path, Identity], bool]


@dataclass(slots=True, eq=False)
class Holding:
    """An open image, with its devices attached to a store.

    Args:
        image: what is open.
        store: of its cache directory.
        attached: its devices, lowest first.
        files: its files by place.
        packed: its pack, if there is one for the start that it is held for.
        accounts: users that have been looked up in its files, by what they were asked for with.
        users: mounts and other images that need it.
        unused: set when there are none any more.
        closed: set when nothing of it is open any more.
        providers: other images whose devices are among ``attached``.
    """

    image: Image
    store: SpanStore
    attached: tuple[AttachedDevice, ...]
    files: FileTable
    packed: Packed | None = None
    accounts: dict[str, ContainerUser] = field(default_factory=dict)
    users: int = 1
    unused: trio.Event = field(default_factory=trio.Event)
    closed: trio.Event = field(default_factory=trio.Event)
    providers: list["Holding"] = field(default_factory=list)

    def serves_another(self) -> bool:
        """Whether whoever comes next may have it, too: it is in use, and nothing of it has turned out wrong."""
        return self.users > 0 and not any(device.refuted for device in self.attached)


@dataclass(frozen=True, slots=True)
class Asked:
    """An image that somebody asked for, once its manifest is known."""

    name: str
    settings: Settings
    workload: str | None
    store: SpanStore


@dataclass(frozen=True, slots=True)
class _Named:
    """What a reference named that the registry need not be asked about.

    Args:
        asked: the image.
        repository: that it is in.
        tag: of the reference, which names the image as long as it names ``digest``.
        digest: None where the reference names one itself.
    """

    asked: Asked
    repository: str
    tag: str
    digest: Digest | None


class OpenImages:
    """What is open and can be told. Belongs to one event loop."""

    def __init__(self) -> None:
        #: What was asked for, told and found, as long as that is open.
        self._opened: dict[Asked, tuple[Holding, Mark]] = {}
        #: What is among these by reference, settings and workload.
        self._named: dict[tuple[str, Settings, str], _Named] = {}

    def note_name(self, text: str, asked: Asked, resolved: ResolvedImage) -> None:
        """Remember what a reference names, unless the registry is to be asked each time."""
        reference, contents = resolved.reference, resolved.contents
        if asked.workload is None or not (reference.digest or asked.settings.pull == "missing"):
            return
        tagged = None if reference.digest else contents.tagged
        named = _Named(asked, contents.repository.name, reference.reference, tagged)
        self._named[text, asked.settings, asked.workload] = named

    async def recall(self, text: str, settings: Settings, workload: str, is_store: IsStore) -> Holding | None:
        """What is open already and is what ``text`` names; None when that takes more than a look.

        All that is looked at is on this host, and looked at in one go: it is all that a second start waits for.
        ``is_store`` says whether a store is the one for the settings, and for the directory that they name.
        """
        named = self._named.get((text, settings, workload))
        holding, mark = (None, ()) if named is None else self._opened.get(named.asked, (None, ()))
        if named is None or holding is None or not holding.serves_another():
            return None
        what = _marked(named.asked, holding)

        def look() -> tuple[Path, Identity, bool, Mark]:
            tags, digest = settings.cache_dir / "tags", named.digest
            same = digest is None or known_tag(tags, named.repository, named.tag) == digest
            return *found(settings.cache_dir), same, mark_of(*what)

        path, there, same, now = await trio.to_thread.run_sync(look)
        fits = same and mark == now and is_store(holding.store, settings, path, there)
        return holding if fits and holding.serves_another() else None

    async def unchanged(self, asked: Asked) -> Holding | None:
        """What is open already, and would be opened again in the same way."""
        holding, mark = self._opened.get(asked, (None, ()))
        if holding is None or not holding.serves_another() or asked.workload is None:
            return None
        now = await self._mark(asked, holding)
        return holding if holding.serves_another() and mark == now else None

    async def remember(self, asked: Asked, holding: Holding) -> None:
        """Remember an image that was opened with nothing to be said about it."""
        if asked.workload is not None and can_be_told(holding.image):
            # What is changed in this moment is noticed when it is changed again: a pack costs time, at worst.
            self._opened[asked] = holding, await self._mark(asked, holding)

    async def _mark(self, asked: Asked, holding: Holding) -> Mark:
        return await trio.to_thread.run_sync(mark_of, *_marked(asked, holding))

    def forget(self, holding: Holding) -> None:
        """Forget what is not open any more."""
        self._opened = {one: of for one, of in self._opened.items() if of[0] is not holding}
        self._named = {text: one for text, one in self._named.items() if one.asked in self._opened}


def _marked(asked: Asked, holding: Holding) -> tuple[Digest, Sequence[Digest], Settings, str]:
    image = holding.image
    return image.manifest.digest, image.config.diff_ids, asked.settings, asked.workload or ""


def found(cache_dir: Path) -> tuple[Path, Identity]:
    """Where a cache directory really is, and what is there now. Blocks."""
    path = cache_dir.resolve()
    return path, identity(path)


def identity(cache_dir: Path) -> Identity:
    """Which directory a cache has its devices in. Blocks."""
    try:
        status = (cache_dir / "devices").stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
