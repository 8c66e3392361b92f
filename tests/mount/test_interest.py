"""Work on behalf of whoever has a mount: it rests without them, and goes on with them."""

import trio
from trio.testing import wait_all_tasks_blocked

from veneer.mount.interest import Interest


class Work:
    """Begins, and ends when it may."""

    def __init__(self) -> None:
        self.begun = self.withdrawn = self.done = 0
        self.may_end = trio.Event()

    async def __call__(self) -> None:
        self.begun += 1
        try:
            await self.may_end.wait()
        except trio.Cancelled:
            self.withdrawn += 1
            raise
        self.done += 1


async def test_work_rests_and_goes_on() -> None:
    interest, work = Interest(), Work()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interest.pursue, work)
            await wait_all_tasks_blocked()
            assert (work.begun, work.withdrawn) == (1, 0)
            interest.rest()
            interest.rest()
            await wait_all_tasks_blocked()
            assert (work.begun, work.withdrawn) == (1, 1)
            interest.go_on()
            interest.go_on()
            await wait_all_tasks_blocked()
            assert (work.begun, work.withdrawn) == (2, 1)
            work.may_end.set()
        interest.rest()
        await wait_all_tasks_blocked()
    assert (work.begun, work.done) == (2, 1)


async def test_work_that_nobody_is_there_for_withdraws_what_was_asked_for_ahead() -> None:
    interest, work = Interest(), Work()
    interest.rest()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interest.pursue, work)
            await wait_all_tasks_blocked()
            assert (work.begun, work.withdrawn) == (1, 1)
            work.may_end.set()
            await wait_all_tasks_blocked()
            assert work.done == 0
            interest.go_on()
    assert work.done == 1


async def test_who_is_cancelled_is_not_held_back() -> None:
    interest, work = Interest(), Work()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(interest.pursue, work)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert work.withdrawn == 1
