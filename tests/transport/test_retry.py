"""The retry policy on a mock clock."""

from datetime import UTC, datetime

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import NotFound, RateLimited, RegistryError, Unavailable
from veneer.transport.retry import Attempts, Patience, TransportStats, parse_retry_after


class Failing:
    """Raises the given errors one after the other, then succeeds."""

    def __init__(self, *errors: RegistryError) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        await trio.lowlevel.checkpoint()
        if self.errors:
            raise self.errors.pop(0)
        return "done"


async def test_temporary_errors_are_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    stats = TransportStats()
    operation = Failing(Unavailable("reset"), Unavailable("503"), RateLimited("429"))
    assert await Attempts(Patience(5, 60.0), stats).run(operation, "app") == "done"
    assert (operation.calls, stats.retries) == (4, 3)
    assert 0.3 <= trio.current_time() <= 0.8


async def test_final_errors_are_not_tried_again() -> None:
    for error in (NotFound("gone"), RegistryError("odd")):
        operation = Failing(error)
        with pytest.raises(RegistryError) as caught:
            await Attempts(Patience(5, 60.0), TransportStats()).run(operation, "app")
        assert caught.value is error
        assert operation.calls == 1


async def test_tries_are_bounded(autojump_clock: trio.testing.MockClock) -> None:
    operation = Failing(*(Unavailable("reset") for _ in range(100)))
    with pytest.raises(Unavailable):
        await Attempts(Patience(6, 600.0), TransportStats()).run(operation, "app")
    assert operation.calls == 6


async def test_deadline_ends_waiting_and_hanging(autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(Unavailable, match="not finished within 7 s"):
        await Attempts(Patience(6, 7.0), TransportStats()).run(trio.sleep_forever, "app")
    assert trio.current_time() == 7.0


@pytest.mark.parametrize("kind", [RateLimited, Unavailable])
async def test_retry_after_is_honoured(
    kind: type[RateLimited | Unavailable], autojump_clock: trio.testing.MockClock
) -> None:
    operation = Failing(kind("slow down", retry_after_s=12.0))
    await Attempts(Patience(5, 60.0), TransportStats()).run(operation, "app")
    assert trio.current_time() == 12.0


async def test_retry_after_is_capped(autojump_clock: trio.testing.MockClock) -> None:
    operation = Failing(RateLimited("slow down", retry_after_s=86400.0))
    await Attempts(Patience(5, 3600.0), TransportStats()).run(operation, "app")
    assert trio.current_time() == 60.0


async def test_no_sleep_past_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    error = RateLimited("slow down", retry_after_s=40.0)
    with pytest.raises(RateLimited) as caught:
        await Attempts(Patience(5, 30.0), TransportStats()).run(Failing(error), "app")
    assert caught.value.retry_after_s == 40.0
    assert trio.current_time() == 0.0


async def test_only_real_progress_makes_patience_fresh(autojump_clock: trio.testing.MockClock) -> None:
    attempts = Attempts(Patience(3, 600.0), TransportStats())
    for _ in range(10):
        attempts.progress(1 << 20)
        await attempts.recover(Unavailable("reset"))
    attempts.progress(1)
    await attempts.recover(Unavailable("reset"))
    attempts.progress(1)
    with pytest.raises(Unavailable):
        await attempts.recover(Unavailable("reset"))


NOW = datetime(2026, 10, 21, 7, 28, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("Wed, 21 Oct 2026 07:29:30 GMT", 90.0),
        ("Wed, 21 Oct 2026 07:29:30 -0000", 90.0),
        ("Wed, 21 Oct 2020 07:28:00 GMT", 0.0),
        ("", None),
        ("-5", None),
        ("soon", None),
        ("²", None),
        (f"Wed, 21 Oct {10**20} 07:29:30 GMT", None),
        (f"Wed, 21 Oct 2026 07:29:30 +{10**20}", None),
    ],
)
def test_retry_after_values(value: str, expected: float | None) -> None:
    assert parse_retry_after(value, NOW) == expected


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=60) | st.from_regex(r"\w{3}, \d+ \w{3} \d+ \d+:\d+:\d+ [+-]?\w+", fullmatch=True))
def test_any_retry_after_is_none_or_a_time(value: str) -> None:
    seconds = parse_retry_after(value, NOW)
    assert seconds is None or seconds >= 0
