"""Which of the hints at a start is followed, and what of it is fetched."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from tests.clocks import nothing_happens
from veneer.daemon import hint
from veneer.daemon.hint import follow_hint
from veneer.daemon.report import HintReport
from veneer.image import Image
from veneer.image.hints import Hint
from veneer.image.profiles import keep_profile
from veneer.oci.digest import Digest
from veneer.prefetch.pack import MAX_PACK_SIZE, Place
from veneer.prefetch.profile import Profile, Use
from veneer.store.attached import AttachedDevice
from veneer.store.spanstore import SpanStore
from veneer.store.wanted import Range

LAYER, OTHER = Digest.of(b"layer"), Digest.of(b"other")
MIB = 1 << 20


def profile(*ranges: tuple[int, int], runs: int = 1) -> Profile:
    uses = tuple(Use(LAYER, offset, length, 0.0, 0.0) for offset, length in ranges)
    return Profile("default", str(LAYER), (), runs, uses)


def pack(*places: tuple[Digest, int, int], static: bool) -> object:
    index = SimpleNamespace(places=[Place(*place, at=0) for place in places])
    return SimpleNamespace(named=SimpleNamespace(static=static), index=index)


class Start:
    """A start of an image of one layer, which the registry may have a profile of.

    Attributes:
        fetched: what was fetched for it.
        told: origin and size of the hint that was followed.
        asked: whether the registry was asked when the mount was there, each time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, attached: Profile | None = None) -> None:
        self.fetched: list[tuple[int, int]] = []
        self.told: list[tuple[str, int]] = []
        self.asked: list[bool] = []
        self._mounted = trio.Event()

        async def attached_hint(*_: object) -> Hint | None:
            await trio.lowlevel.checkpoint()
            self.asked.append(self._mounted.is_set())
            return None if attached is None else Hint("attached", (), attached)

        monkeypatch.setattr(hint, "attached_hint", attached_hint)

    async def bring(self, ranges: Iterable[Range], *, priority: object) -> None:
        await trio.lowlevel.checkpoint()
        self.fetched += [(one.offset, one.length) for one in ranges]

    def tell(self, report: HintReport) -> None:
        self.told.append((report.origin, report.size))

    async def follow(self, cache_dir: Path, found_pack: object = None) -> None:
        device = SimpleNamespace(diff_id=LAYER)
        image: Any = SimpleNamespace(
            pack=found_pack, devices=[device], name="image", repository=None, manifest=None
        )
        attached = cast("Sequence[AttachedDevice]", [SimpleNamespace(device=device)])
        store = cast("SpanStore", self)
        what = cast("Image", image), store, attached, cache_dir, "default", ()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow_hint, *what, self._mounted, self.tell)
            await nothing_happens()
            self._mounted.set()


async def test_beside_a_recorded_pack_nothing_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_profile(tmp_path, LAYER, profile((0, MIB)))
    start = Start(monkeypatch, profile((0, MIB)))
    await start.follow(tmp_path, pack((LAYER, 0, MIB), static=False))
    assert (start.fetched, start.told, start.asked) == ([], [], [])


async def test_what_a_static_pack_has_is_not_fetched_besides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_profile(tmp_path, LAYER, profile((0, 3 * MIB), (8 * MIB, MIB)))
    start = Start(monkeypatch)
    await start.follow(tmp_path, pack((LAYER, MIB, MIB), (OTHER, 0, MIB), (LAYER, 8 * MIB, MIB), static=True))
    assert start.fetched == [(0, MIB), (2 * MIB, MIB)]
    assert start.told == [("host", 4 * MIB)]
    assert start.asked == [], "what was recorded here is good enough"


@pytest.mark.parametrize("known", [False, True])
async def test_what_was_recorded_elsewhere_is_better_than_what_was_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    if known:
        keep_profile(tmp_path, LAYER, profile((0, MIB), runs=0))
    start = Start(monkeypatch, profile((2 * MIB, 2 * MIB)))
    await start.follow(tmp_path)
    assert start.told == [("attached", 2 * MIB)]
    assert start.fetched == [(2 * MIB, 2 * MIB)]
    assert start.asked == [True], "the mount does not wait for the answer"
    start = Start(monkeypatch)
    await start.follow(tmp_path)
    assert start.told == ([("host", MIB)] if known else [])
    assert start.fetched == ([(0, MIB)] if known else [])


async def test_no_more_is_fetched_than_any_start_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = MAX_PACK_SIZE // 2
    keep_profile(tmp_path, LAYER, profile((0, half + 1), (half + 1, half), (2 * MAX_PACK_SIZE, 4096)))
    start = Start(monkeypatch)
    await start.follow(tmp_path)
    assert start.fetched == [(0, half + 1), (2 * MAX_PACK_SIZE, 4096)]
