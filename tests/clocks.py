"""Clocks and waits that know a test that waits from a machine that is busy."""

from trio.testing import MockClock, active_thread_count, wait_all_tasks_blocked

__all__ = ["nothing_happens", "patient_clock"]


def patient_clock(threshold_s: float = 0.05) -> MockClock:
    """A clock that jumps to the next deadline when nothing happens; as long as a thread works, something does.

    Args:
        threshold_s: how long nothing has to happen: on loopback the kernel may take a moment.
    """
    clock = MockClock(autojump_threshold=threshold_s)
    jump = clock._autojump

    def jump_without_threads() -> None:
        if not active_thread_count():
            jump()

    # The class is final.
    clock._autojump = jump_without_threads  # type: ignore[method-assign]
    return clock


async def nothing_happens() -> None:
    """Wait until all tasks wait for something that is not the work of a thread."""
    await wait_all_tasks_blocked(0.02)
    while active_thread_count():
        await wait_all_tasks_blocked(0.02)
