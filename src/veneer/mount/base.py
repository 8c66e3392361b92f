"""What a backend is: one way to make a tree visible on a directory."""

from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["Choice", "Counters", "Mounter"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and why it is that one."""

    backend: str
    reason: str


class Counters(Protocol):
    """Integers that only grow."""

    def to_json(self) -> dict[str, int]:
        """The counters by name."""


class Mounter(Protocol):
    """One backend with one image to show. Belongs to one event loop.

    Attributes:
        choice: what it is.
    """

    choice: Choice

    @property
    def inodes(self) -> int:
        """Number of inodes that it shows."""

    @property
    def direct(self) -> Collection[int]:
        """Numbers of the image's devices that the kernel reads from the cache without asking anybody."""

    @property
    def stats(self) -> Counters:
        """Requests of the kernel that reached this process."""

    def shown(self, target: Path, gone: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """Show the tree on ``target``, an existing directory, and serve it as long as the context lasts.

        Whoever unmounts ``target``, and its last user leaves, ends the serving: ``gone`` is called then, at
        least once. Before leaving the context its user unmounts ``target``; whoever is still there gets errors
        afterwards.

        Raises MountError.
        """
