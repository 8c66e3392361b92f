"""The trees that containers of one image share, kept for a while after the last of them has ended.

A tree has the page cache of what was read from it, its devices held and its image open: whoever starts the same
image with the same pack again finds all of that. It is nobody's mount: it is in no directory while no place
has it, and vanishes with this process.

What is only kept fetches nothing, and is let go of as soon as it is in anybody's way: of the end of the daemon,
of the quota, of whoever deletes the cache or wants it with other settings.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from veneer.daemon.holdings import Holding, Holdings
from veneer.mount.resident import ResidentMounter
from veneer.mount.shared import SharedTree
from veneer.store.spanstore import SpanStore

__all__ = ["KEEP_S", "MOST_KEPT", "Tree", "Trees"]

log = logging.getLogger(__name__)

#: Whoever starts an image again usually does so soon.
KEEP_S = 300.0
#: Trees that nobody uses: each is an open image, some megabytes of this process, besides what the kernel gives
#: up by itself when memory is short.
MOST_KEPT = 8
#: Letting go takes milliseconds, or on a machine that is overloaded seconds; who does not wait for it goes on
#: filling files that are deleted. When it takes longer, somebody has it in a place that we do not know.
_LET_GO_S = 10.0


@dataclass(slots=True, eq=False)
class Tree:
    """One tree, and who uses it.

    Args:
        shared: the tree.
        holding: its image and devices.
        keep: whether it is kept when nobody uses it.
        users: places that have it.
        places: how many have had it.
    """

    shared: SharedTree
    holding: Holding
    keep: bool
    users: int = 0
    places: int = 0
    idle_since: float = 0.0
    expiry: trio.CancelScope = field(default_factory=trio.CancelScope)


class Trees:
    """Belongs to one event loop.

    Args:
        nursery: owns the trees.
        holdings: what is open.
        count: told of trees that have been let go of, and are gone: both are somebody's to wait for.
    """

    def __init__(self, nursery: trio.Nursery, holdings: Holdings, count: Callable[[int], None]) -> None:
        self._nursery = nursery
        self._holdings = holdings
        self._count = count
        self._trees: dict[Holding, Tree] = {}
        #: Nothing is kept any more: the process is about to end.
        self._closing = False

    def take(self, holding: Holding, make: Callable[[], ResidentMounter]) -> Tree:
        """The tree of an image for one more place, maybe still in the making. ``make`` says how."""
        tree = self._trees.get(holding)
        if tree is None:
            tree = self._trees[holding] = self._begin(holding, SharedTree(make()), keep=True)
        tree.expiry.cancel()
        tree.shared.go_on()
        tree.users += 1
        tree.places += 1
        return tree

    def found(self, holding: Holding, mounter: ResidentMounter, place: Path) -> Tree:
        """A tree that an earlier process made, for the place that has it and no other."""
        tree = self._begin(holding, SharedTree(mounter, place), keep=False)
        tree.users = tree.places = 1
        return tree

    def give_back(self, tree: Tree) -> None:
        """Tell that one place has gone."""
        tree.users -= 1
        if tree.users or tree.shared.gone.is_set():
            return
        tree.idle_since = trio.current_time()
        if not tree.keep or self._closing:
            self._let_go(tree)
            return
        tree.shared.rest()
        tree.expiry = trio.CancelScope()
        self._nursery.start_soon(self._expire, tree, tree.expiry)
        idle = self.kept
        for oldest in sorted(idle, key=lambda one: one.idle_since)[: max(0, len(idle) - MOST_KEPT)]:
            self._let_go(oldest)

    @property
    def kept(self) -> list[Tree]:
        """Those that nobody uses."""
        return [tree for tree in self._trees.values() if not tree.users]

    def to_json(self) -> list[dict[str, object]]:
        """What there is: images, and how many places have them now, and have had them so far."""
        now = trio.current_time()
        return [
            {
                "image": tree.holding.image.name,
                "users": tree.users,
                "places": tree.places,
                "idle_s": None if tree.users else round(now - tree.idle_since, 1),
                "pack": _pack_of(tree),
            }
            for tree in self._trees.values()
        ]

    async def let_go(self, store: SpanStore | None = None) -> int:
        """Let go of what is only kept, of one store or of all, and wait, but not for long, until it is gone."""
        return await self._let_all_go([t for t in self.kept if store in (None, t.holding.store)])

    async def close(self) -> None:
        """Keep nothing from now on."""
        self._closing = True
        await self.let_go()

    async def let_go_deleted(self) -> None:
        """Let go of what reads files that have been deleted, and would be filled in vain."""
        await self._let_all_go([tree for tree in self.kept if _is_deleted(tree)])

    def let_go_soon(self, store: SpanStore) -> None:
        """The same as :meth:`let_go`, for whoever cannot wait."""
        for tree in [tree for tree in self.kept if tree.holding.store is store]:
            self._let_go(tree)

    async def _let_all_go(self, trees: list[Tree]) -> int:
        for tree in trees:
            self._let_go(tree)
        with trio.move_on_after(_LET_GO_S):
            for tree in trees:
                await tree.shared.gone.wait()
                if not tree.holding.users:
                    await tree.holding.closed.wait()
        return len(trees)

    def _let_go(self, tree: Tree) -> None:
        if self._trees.get(tree.holding) is tree:
            del self._trees[tree.holding]
        tree.expiry.cancel()
        tree.shared.let_go()
        self._count(1)
        self._nursery.start_soon(self._until_gone, tree)

    async def _until_gone(self, tree: Tree) -> None:
        with trio.CancelScope(shield=True):
            await tree.shared.gone.wait()
        self._count(-1)
        log.info("tree gone image=%s places=%d", tree.holding.image.name, tree.places)

    def _begin(self, holding: Holding, shared: SharedTree, *, keep: bool) -> Tree:
        self._holdings.keep(holding)
        tree = Tree(shared, holding, keep)
        self._nursery.start_soon(self._keep, tree)
        return tree

    async def _keep(self, tree: Tree) -> None:
        try:
            await tree.shared.keep()
        except Exception:
            # What ends one tree must not end what serves all others.
            log.exception("bug in the tree of image=%s", tree.holding.image.name)
        finally:
            if self._trees.get(tree.holding) is tree:
                del self._trees[tree.holding]
            self._holdings.give_back(tree.holding)

    async def _expire(self, tree: Tree, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep(KEEP_S)
            if not scope.cancel_called:  # it may have been taken in that very moment
                self._let_go(tree)


def _pack_of(tree: Tree) -> dict[str, int] | None:
    """How much of its pack has been fetched, if it has one."""
    if (packed := tree.shared.mounter.packed) is None:
        return None
    return {"size": packed.attached.size, "cached": packed.attached.cached}


def _is_deleted(tree: Tree) -> bool:
    descriptors = (one.data_fd for one in tree.shared.attached)
    return any(fd is not None and not os.fstat(fd).st_nlink for fd in descriptors)
