"""The sample image and the workplace of the mount tests."""

from tests.daemon.conftest import image, sample_layout, settings, workplace

__all__ = ["image", "sample_layout", "settings", "workplace"]
