"""A directory of its own for each test with mounts, and one image for all of them."""

from tests.daemon.conftest import settings, workplace

__all__ = ["settings", "workplace"]
