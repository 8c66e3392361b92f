"""JSON as veneer writes it and as it is willing to read it.

Writing: compact separators, UTF-8, members in the order given, so equal values give equal bytes and digests.
Reading: the documents come from strangers. What two parsers could read differently (duplicate members, NaN,
numbers that overflow, lone surrogates) or what costs more than it is worth (depth, size) is refused, so
nothing that a signature or digest covers means one thing here and another elsewhere.

Not for: numbers with a fraction as identity; nothing that veneer writes has them.
"""

import json
import math
import re
from collections.abc import Iterable

from veneer.errors import IntegrityError

__all__ = ["MAX_JSON_CONTAINERS", "MAX_JSON_DEPTH", "Json", "canonical_json", "parse_json"]

#: A decoded JSON value.
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

#: Manifests nest 5 deep and configs 4; more has no meaning that anything here reads.
MAX_JSON_DEPTH = 64
#: 4 MiB of ``{},{},`` would be 100 MiB of objects; the fullest index (10,000 entries) has some 40,000.
MAX_JSON_CONTAINERS = 200_000
#: The longest integer is a size below 2^63 with its sign.
_MAX_INT_DIGITS = 20
#: Only escapes can bring a surrogate into text that was decoded from UTF-8.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def canonical_json(value: object) -> bytes:
    """The bytes that stand for ``value``; members keep the order they are in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def parse_json(data: bytes, what: str, *, limit: int, containers: int = MAX_JSON_CONTAINERS) -> Json:
    """Decode one document of at most ``limit`` bytes; ``what`` names it in the :class:`IntegrityError`."""
    if len(data) > limit:
        raise IntegrityError(f"{what} has {len(data)} bytes, more than the {limit} allowed")
    if data.count(b"{") + data.count(b"[") > containers:
        raise IntegrityError(f"{what} has more than {containers} objects and lists")
    try:
        value: Json = json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
        if _SURROGATE_ESCAPE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise IntegrityError(f"{what} is nested too deeply") from error
    except ValueError as error:  # malformed JSON, malformed UTF-8, or one of the refusals below
        raise IntegrityError(f"{what} is not valid JSON: {error}") from error
    _check_depth(value, what)
    return value


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("an object has two members of the same name")
    return out


def _integer(text: str) -> int:
    if len(text) > _MAX_INT_DIGITS:
        raise ValueError("an integer is too long")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _constant(text: str) -> Json:
    raise ValueError(f"{text} is not a number")


def _check_depth(value: Json, what: str) -> None:
    level: list[Json] = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [child for node in level for child in _children(node) if isinstance(child, dict | list)]
        if not level:
            return
    raise IntegrityError(f"{what} is nested too deeply")


def _children(node: Json) -> Iterable[Json]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()
