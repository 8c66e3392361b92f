"""The option that says how an image is mounted."""

from dataclasses import replace

from veneer.cli.parser import Parser
from veneer.settings import BACKENDS, Settings

__all__ = ["add_backend_argument", "with_backend"]


def add_backend_argument(parser: Parser) -> None:
    """Declare ``--backend``."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        metavar="NAME",
        help="How to mount: fuse, erofs-fuse (root, Linux 6.12), erofs-fanotify (root, Linux 6.14, fastest), "
        "or auto, the best that works.",
    )


def with_backend(settings: Settings, backend: str | None) -> Settings:
    """The settings with what the option says, if it was given."""
    return settings if backend is None else replace(settings, backend=backend)
