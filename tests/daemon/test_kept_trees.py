"""How long trees are kept, and how many."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import trio

from veneer.daemon.holdings import Holding, Holdings
from veneer.daemon.trees import KEEP_S, MOST_KEPT, Trees
from veneer.mount.interest import Interest
from veneer.mount.resident import HeldTree, ResidentMounter


class Mounter:
    """Makes trees of nothing; the end of each is told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.interest = Interest()

    async def serves(self) -> bool:
        """Whether what is fetched ahead for its places goes on."""
        with trio.move_on_after(0.01) as scope:
            await self.interest.there()
        return not scope.cancelled_caught

    def has_ended(self) -> bool:
        return bool(self.events)

    @asynccontextmanager
    async def held(self, _found: object) -> AsyncIterator[HeldTree]:
        try:
            yield HeldTree(None, trio.sleep_forever, (), None)
        finally:
            self.events.append("ended")


class Images:
    """Stands for :class:`Holdings`."""

    def keep(self, holding: Any) -> None:
        holding.users += 1

    def give_back(self, holding: Any) -> None:
        holding.users -= 1


def a_holding() -> Holding:
    image = SimpleNamespace(name="image")
    return Holding(cast("Any", image), cast("Any", None), (), cast("Any", None))


def trees_in(nursery: trio.Nursery) -> Trees:
    return Trees(nursery, cast("Holdings", Images()), lambda _change: None)


async def test_a_tree_is_kept_for_a_while_after_its_last_place(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        trees, holding, mounter = trees_in(nursery), a_holding(), Mounter()
        made = cast("ResidentMounter", mounter)
        first = trees.take(holding, lambda: made)
        assert trees.take(holding, lambda: made) is first
        trees.give_back(first)
        await trio.sleep(2 * KEEP_S)
        assert not mounter.has_ended(), "it is in use"
        assert await mounter.serves()
        trees.give_back(first)
        await trio.sleep(KEEP_S - 1)
        assert not await mounter.serves()
        assert trees.take(holding, lambda: made) is first
        assert await mounter.serves()
        trees.give_back(first)
        await trio.sleep(KEEP_S - 1)
        assert [tree.places for tree in trees.kept] == [3]
        await trio.sleep(2)
        assert mounter.has_ended()
        assert trees.kept == []
        assert holding.users == 1
        nursery.cancel_scope.cancel()


async def test_of_too_many_the_one_that_nobody_used_for_longest_goes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        trees = trees_in(nursery)
        mounters = [Mounter() for _ in range(MOST_KEPT + 2)]
        for mounter in mounters:
            tree = trees.take(a_holding(), lambda made=mounter: cast("ResidentMounter", made))  # type: ignore[misc]
            await trio.sleep(1)
            trees.give_back(tree)
        await trio.sleep(1)
        assert [mounter.has_ended() for mounter in mounters] == [True, True, *[False] * MOST_KEPT]
        nursery.cancel_scope.cancel()
