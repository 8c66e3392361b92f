"""Where a writable layer is kept."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import UsageError

__all__ = ["Upper", "discard", "private_upper"]


@dataclass(frozen=True, slots=True)
class Upper:
    """A writable layer.

    Args:
        directory: holds what was written, in overlayfs's own form.
        work: scratch space of the kernel, on the same file system, used by one mount at a time.
        private: nobody wants the contents after the mount: they need not survive a crash.
    """

    directory: Path
    work: Path
    private: bool = False

    @classmethod
    def at(cls, directory: Path) -> "Upper":
        """The layer that a user keeps in ``directory``; its scratch space is made next to it."""
        directory = Path(os.path.abspath(directory))
        if not directory.name:
            raise UsageError(f"{directory} cannot be an upper directory")
        return cls(directory, directory.with_name(f".{directory.name}.veneer-work"))


def private_upper(parent: Path) -> Upper:
    """A layer under ``parent``, a directory of its own that goes with it."""
    return Upper(parent / "upper", parent / "work", private=True)


def discard(upper: Upper) -> None:
    """Remove what only the kernel or a private layer needed; blocks."""
    import shutil  # here: whoever lists mounts does without

    shutil.rmtree(upper.work, ignore_errors=True)
    if upper.private:
        shutil.rmtree(upper.directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            upper.directory.parent.rmdir()
