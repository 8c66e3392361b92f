"""What is made of the times of requests: how wide a link is."""

import pytest

from veneer.store.link import LinkEstimate

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def near() -> LinkEstimate:
    """A registry on the same machine: 10 ms until it answers, 500 MB/s."""
    link = LinkEstimate()
    for length in (MIB, 2 * MIB, MIB, 4 * MIB):
        link.observe(length, 0.010 + length / 500e6)
    assert link.is_wide
    return link


def test_a_registry_that_is_busy_makes_a_wide_link_no_narrower(near: LinkEstimate) -> None:
    for length, seconds in ((30 * KIB, 0.004), (400 * KIB, 0.050)) * 20:
        near.observe(length, seconds)
    assert near.is_wide


def test_one_long_range_that_comes_slowly_does(near: LinkEstimate) -> None:
    for _ in range(8):
        near.observe(60 * KIB, 0.005)
    near.observe(2 * MIB, 2 * MIB / 12.5e6)
    near.observe(4 * MIB, 4 * MIB / 12.5e6)
    assert not near.is_wide
