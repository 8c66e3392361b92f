"""Frozen dataclasses from JSON, as their annotations say.

Strict both ways: a member that is missing and has no default, one that is unknown, and a value of another
type are errors. Not for formats that others write: those have parsers of their own.
"""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union

from veneer.errors import IntegrityError
from veneer.oci.canonical import Json

__all__ = ["decode"]

T = TypeVar("T")


def decode(kind: type[T], value: Json, what: str) -> T:
    """An object of the dataclass ``kind``.

    Its fields may be str, int, float, bool, None, object (any JSON), tuples and string mappings of those, other
    such dataclasses, and unions of all that.

    Raises:
        IntegrityError: the value is something else; ``what`` says where it is from.
    """
    made = _value(kind, value, what)
    if not isinstance(made, kind):
        raise IntegrityError(f"{what} is no {kind.__name__}")
    return made


def _value(kind: Any, value: Json, what: str) -> object:
    if kind is object:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, what)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, f"{what}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{what}.{key}") for key, item in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        return _object(kind, value, what)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise IntegrityError(f"{what} is {type(value).__name__}, not {getattr(kind, '__name__', kind)}")


def _union(kinds: tuple[Any, ...], value: Json, what: str) -> object:
    for kind in kinds:
        if kind is type(None) and value is None:
            return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    for kind in kinds[:-1]:
        try:
            return _value(kind, value, what)
        except IntegrityError:
            continue
    return _value(kinds[-1], value, what)


def _object(kind: Any, value: Mapping[str, Json], what: str) -> object:
    hints, known = typing.get_type_hints(kind), fields(kind)
    unknown = value.keys() - {field.name for field in known}
    if unknown:
        raise IntegrityError(f"{what} has members that are unknown: {', '.join(sorted(unknown))}")
    out: dict[str, object] = {}
    for field in known:
        if field.name in value:
            out[field.name] = _value(hints[field.name], value[field.name], f"{what}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise IntegrityError(f"{what} has no member {field.name}")
    return kind(**out)
