"""Parsing WWW-Authenticate (RFC 9110, 11.6.1): what a registry wants to see before it answers.

Pure, and believes nothing: a malformed challenge is left out, and what comes before it still counts.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Challenge", "parse_challenges"]

#: Servers limit all headers together to 8-16 KiB.
_MAX_HEADER = 16384
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME = re.compile(rf"[\s,]*({_TOKEN})(?=\s|,|$)")
_PARAMETER = re.compile(rf'[\s,]*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"=][^\s,"]*))\s*(?=,|$)')
_TOKEN68 = re.compile(r"\s+[A-Za-z0-9._~+/-]+=*\s*(?=,|$)")
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate: the scheme in lower case, parameter names in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """The challenges of all WWW-Authenticate headers of one answer, in order."""
    return [challenge for header in headers for challenge in _parse(header[:_MAX_HEADER])]


def _parse(header: str) -> list[Challenge]:
    found, place = [], 0
    while scheme := _SCHEME.match(header, place):
        place = scheme.end()
        parameters: dict[str, str] = {}
        while parameter := _PARAMETER.match(header, place):
            name, quoted, bare = parameter.groups()
            parameters.setdefault(name.lower(), bare if quoted is None else _ESCAPED.sub(r"\1", quoted))
            place = parameter.end()
        if not parameters and (token := _TOKEN68.match(header, place)):
            place = token.end()
        found.append(Challenge(scheme[1].lower(), parameters))
    return found
