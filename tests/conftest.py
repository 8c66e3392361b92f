"""What holds for all tests: none goes on for ever, and none fails because the machine is slow.

Programs that tests start find the modules compiled, as they are where veneer is installed.
"""

import faulthandler
import os
import signal
from collections.abc import Generator
from types import FrameType
from typing import TypeVar

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from trio.testing import MockClock

from tests.clocks import patient_clock

T = TypeVar("T")

#: What setting up, running or tearing down one test may take, many times what any of them needs. One that
#: cannot be interrupted then, as it waits in the kernel, ends the whole run after ``faulthandler_timeout``.
LIMIT_S = 300.0
#: The same for a test that is marked slow: its images may have to be built of packages first.
SLOW_LIMIT_S = 900.0
#: The stream of errors that is not captured.
STDERR = pytest.StashKey[int]()

# Else each of hundreds of processes compiles all that it imports: a third of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# In the background of a shell Ctrl-C is ignored, and whatever tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Keeps what is there: in CI, examples are the same every time.
hypothesis_settings.register_profile(
    "slow machine", hypothesis_settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("slow machine")


@pytest.fixture
def autojump_clock() -> MockClock:
    """In place of that of pytest-trio, which jumps while a thread works."""
    return patient_clock(0.001)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)


def limited(item: pytest.Item) -> Generator[None, T, T]:
    """Fail what takes too long, by what Ctrl-C does: trio knows how to end tasks by it."""
    limit_s = SLOW_LIMIT_S if item.get_closest_marker("slow") else LIMIT_S
    expired = False

    def expire(_number: int, frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        stderr = item.config.stash[STDERR]
        os.write(stderr, f"\n{item.nodeid} has not ended after {limit_s:.0f} s\n".encode())
        faulthandler.dump_traceback(stderr)
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):  # ignored, as in the background of a shell
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        return (yield)
    except BaseException as error:
        if not expired:
            raise
        raise TimeoutError(f"not ended after {limit_s:.0f} s") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, T, T]:
    return (yield from limited(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, T, T]:
    return (yield from limited(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, T, T]:
    return (yield from limited(item))
