"""What long work tells, from the process that does it to the one whose user waits.

Progress comes with every chunk of a download; a person sees a few changes a second. Notices always pass.
"""

import time
from collections.abc import Callable

from veneer.events import Event, Progress, event_to_json

__all__ = ["Tell", "Telling"]

#: Sends one message; must not wait.
Tell = Callable[[dict[str, object]], None]

_INTERVAL_S = 0.2


class Telling:
    """A reporter that sends what is worth it. For one event loop."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._last: dict[tuple[str, str], float] = {}

    def __call__(self, event: Event) -> None:
        """Send the event, unless it is progress and the last one was just now."""
        if isinstance(event, Progress) and event.done != event.total:
            key, now = (event.task, event.item), time.monotonic()
            if now - self._last.get(key, -_INTERVAL_S) < _INTERVAL_S:
                return
            self._last[key] = now
        self._tell(event_to_json(event))
