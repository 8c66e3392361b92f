"""Members of a JSON object, taken one by one and held against what they have to be."""

import math

from veneer.errors import IntegrityError
from veneer.oci.canonical import Json

__all__ = ["Facts", "bad", "count", "number", "text"]

#: Every list of a record; a log keeps less.
_MAX_ENTRIES = 1 << 16
_MAX_TEXT = 4096
_MAX_BYTES = 1 << 53
#: Eleven days, as in profiles.
_MAX_MS = 1e9


def bad(problem: str) -> IntegrityError:
    """What to raise for a record that is none."""
    return IntegrityError(f"timing record: {problem}")


class Facts:
    """A JSON object whose members are looked at one by one. Methods raise IntegrityError.

    Args:
        value: maybe an object.
        what: it is, for messages.
    """

    def __init__(self, value: Json, what: str) -> None:
        if not isinstance(value, dict):
            raise bad(f"{what} is no object")
        self._value = value

    def get(self, name: str) -> Json:
        """Any value."""
        if name not in self._value:
            raise bad(f"{name} is missing")
        return self._value[name]

    def text(self, name: str) -> str:
        """A text."""
        return text(self.get(name), name)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        return tuple(text(one, name) for one in self._list(name))

    def number(self, name: str) -> float:
        """A number."""
        return number(self.get(name), name)

    def time(self, name: str) -> float | None:
        """A number, or null for what has not happened."""
        value = self.get(name)
        return None if value is None else number(value, name)

    def count(self, name: str) -> int:
        """An integer that is not negative."""
        return count(self.get(name), name)

    def objects(self, name: str) -> "list[Facts]":
        """A list of objects."""
        return [Facts(one, f"one of {name}") for one in self._list(name)]

    def rows(self, name: str) -> list[list[Json]]:
        """A list of lists."""
        rows = [one for one in self._list(name) if isinstance(one, list)]
        if len(rows) != len(self._list(name)):
            raise bad(f"one of {name} is no list")
        return rows

    def _list(self, name: str) -> list[Json]:
        value = self.get(name)
        if not isinstance(value, list) or len(value) > _MAX_ENTRIES:
            raise bad(f"{name} is no list of at most {_MAX_ENTRIES}")
        return value


def text(value: Json, name: str) -> str:
    """The text that a value is."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise bad(f"{name} is no text of at most {_MAX_TEXT}")
    return value


def number(value: Json, name: str) -> float:
    """The number that a value is."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise bad(f"{name} is no number")
    if abs(value) > _MAX_MS:
        raise bad(f"{name} is out of range")
    return float(value)


def count(value: Json, name: str) -> int:
    """The count that a value is."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_BYTES:
        raise bad(f"{name} is no count")
    return value
