"""What long work tells whoever watches it: one stream of events, rendered as text or JSON by the CLI.

Library code takes a :data:`Reporter` and calls it; it never prints and never asks whether anyone looks.
"""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Event", "Notice", "Progress", "Reporter", "event_from_json", "event_to_json", "silent"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Some work has reached ``done`` of ``total`` units.

    Args:
        task: stable name of the kind of work, such as ``convert`` or ``push``.
        item: what it works on, such as a short digest.
        done: units finished so far; equal to ``total`` exactly once, at the end.
        total: units in all, or None when nobody knows yet.
        unit: ``bytes``, ``spans``, ``layers`` or ``files``.
    """

    task: str
    item: str
    done: int
    total: int | None = None
    unit: str = "bytes"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should know although nothing failed (a dropped device node, a skipped layer)."""

    message: str


Event = Progress | Notice
Reporter = Callable[[Event], None]


def event_to_json(event: Event) -> dict[str, object]:
    """The event as processes tell each other, and as ``--json`` shows it."""
    if isinstance(event, Notice):
        return {"type": "notice", "message": event.message}
    return {
        "type": "progress",
        "task": event.task,
        "item": event.item,
        "done": event.done,
        "total": event.total,
        "unit": event.unit,
    }


def event_from_json(message: dict[str, object]) -> Event | None:
    """The event in a message, if it is one."""
    match message:
        case {"type": "notice", "message": str(text)}:
            return Notice(text)
        case {
            "type": "progress",
            "task": str(task),
            "item": str(item),
            "done": int(done),
            "total": int() | None as total,
            "unit": str(unit),
        }:
            return Progress(task, item, done, total, unit)
    return None


def silent(_event: Event) -> None:
    """A reporter for when nobody watches."""
