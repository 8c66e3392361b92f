"""Errors on their way from one process to another."""

from collections.abc import Iterator

from veneer.errors import VeneerError

__all__ = ["error_from_json", "error_to_json"]


def error_to_json(error: VeneerError) -> dict[str, object]:
    """An error for another process."""
    return {"type": "error", "code": error.exit_code, "message": error.message, "hint": error.hint}


def error_from_json(value: dict[str, object]) -> VeneerError:
    """The same error here: its class follows from its exit code."""
    code, hint = value.get("code"), value.get("hint")
    cls = next((found for found in _error_classes(VeneerError) if found.exit_code == code), VeneerError)
    return cls(str(value.get("message")), hint=None if hint is None else str(hint))


def _error_classes(root: type[VeneerError]) -> Iterator[type[VeneerError]]:
    yield root
    for found in root.__subclasses__():
        yield from _error_classes(found)
