"""The options that say how an image is found and mounted."""

from dataclasses import replace

from veneer.cli.parser import Parser
from veneer.settings import BACKENDS, PULLS, Settings

__all__ = [
    "DEFAULT_WORKLOAD",
    "add_backend_argument",
    "add_pull_argument",
    "add_workload_argument",
    "with_backend",
]

#: As in :mod:`veneer.prefetch.profile`, which is not imported for help.
DEFAULT_WORKLOAD = "default"


def add_backend_argument(parser: Parser) -> None:
    """Declare ``--backend``."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        metavar="NAME",
        help="How to mount: fuse, erofs-fuse (root, Linux 6.12), erofs-fanotify (root, Linux 6.14, fastest), "
        "or auto, the best that works.",
    )


def add_pull_argument(parser: Parser) -> None:
    """Declare ``--pull``."""
    parser.add_argument(
        "--pull",
        choices=PULLS,
        default=PULLS[0],
        metavar="WHEN",
        help="When to ask the registry what a tag names: always, or if that is missing. [default: %(default)s]",
    )


def add_workload_argument(parser: Parser) -> None:
    """Declare ``--workload``."""
    parser.add_argument(
        "--workload",
        default=DEFAULT_WORKLOAD,
        metavar="NAME",
        help="Which pack to use, if the image or this host has one. [default: %(default)s]",
    )


def with_backend(settings: Settings, backend: str | None, pull: str = PULLS[0]) -> Settings:
    """The settings with what the options say."""
    return replace(settings, backend=settings.backend if backend is None else backend, pull=pull)
