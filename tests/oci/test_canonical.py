"""JSON as it is written and read."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oci.strategies import json_values
from veneer.errors import IntegrityError
from veneer.oci.canonical import MAX_JSON_CONTAINERS, MAX_JSON_DEPTH, canonical_json, parse_json

LIMIT = 1 << 20


def test_written_bytes_are_compact_utf8_in_the_order_given() -> None:
    assert canonical_json({"z": 1, "a": ["é", None]}) == '{"z":1,"a":["é",null]}'.encode()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'"\xff"', "not valid JSON"),
        ('"x"'.encode("utf-16"), "not valid JSON"),
        (b'{"a": 1, "a": 1}', "two members of the same name"),
        (b'{"a": 1, "\\u0061": 2}', "two members of the same name"),
        (b"[NaN]", "NaN is not a number"),
        (b"-Infinity", "not a number"),
        (b"1e999", "too large"),
        (b"123456789012345678901234567890", "too long"),
        (b"1" * 10_000, "too long"),
        (b'"\\ud800"', "not valid JSON"),
        (b'{"\\uDFFF": 0}', "not valid JSON"),
        (b"[" * (MAX_JSON_DEPTH + 2) + b"]" * (MAX_JSON_DEPTH + 2), "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"0" + b"}" * 100_000, "nested too deeply"),
        (b" " * (LIMIT + 1), "more than"),
        (b"[" + b"{}," * MAX_JSON_CONTAINERS + b"{}]", "objects and lists"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else "",
)
def test_what_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(IntegrityError, match=why):
        parse_json(data, "document", limit=LIMIT)


def test_what_is_allowed_at_the_limits() -> None:
    assert parse_json(b'"\\ud83d\\ude00"', "document", limit=LIMIT) == "😀"
    assert parse_json(b"9223372036854775807", "document", limit=19) == (1 << 63) - 1
    deep = b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH
    assert parse_json(deep, "document", limit=LIMIT) == json.loads(deep)
    wide = b"[" + b"{}," * (MAX_JSON_CONTAINERS - 2) + b"{}]"
    assert parse_json(wide, "document", limit=LIMIT) == [{}] * (MAX_JSON_CONTAINERS - 1)


@settings(deadline=None)
@given(json_values.filter(lambda value: all(len(word) < 20 for word in str(value).split())))
def test_round_trip(value: object) -> None:
    assert parse_json(canonical_json(value), "document", limit=LIMIT) == value


@settings(deadline=None)
@given(st.binary(max_size=64) | st.text(alphabet='{}[]",:0e-9\\ud8truenl ', max_size=64).map(str.encode))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        value = parse_json(data, "document", limit=LIMIT)
    except IntegrityError:
        return
    assert parse_json(canonical_json(value), "document", limit=LIMIT) == value
