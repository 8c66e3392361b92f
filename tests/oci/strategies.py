"""Random valid values of the OCI types, and JSON documents with something wrong in a random place."""

import copy
from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

from veneer.oci.descriptor import MAX_BLOB_SIZE, Descriptor, Platform
from veneer.oci.digest import Digest

#: Any text that UTF-8 can carry, control characters included.
texts = st.text(max_size=20)
digests = st.one_of(
    st.binary(max_size=8).map(Digest.of), st.binary(max_size=8).map(lambda data: Digest.of(data, "sha512"))
)
media_types = st.from_regex(r"[a-z][a-z0-9.+-]{0,20}/[a-z][a-z0-9.+-]{0,20}", fullmatch=True)
annotations = st.dictionaries(texts, texts, max_size=3)
platforms = st.builds(
    Platform,
    st.sampled_from(["linux", "windows"]),
    st.sampled_from(["amd64", "arm", "arm64"]),
    st.sampled_from(["", "v6", "v7", "v8"]),
)
descriptors = st.builds(
    Descriptor,
    media_types,
    digests,
    st.integers(0, MAX_BLOB_SIZE),
    annotations,
    st.none() | platforms,
    st.just("") | media_types,
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)


def places(document: Any) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document, the document itself included."""
    found: list[tuple[Any, ...]] = [()]
    keys: Iterable[Any] = document if isinstance(document, dict) else ()
    if isinstance(document, list):
        keys = range(len(document))
    for key in keys:
        found += [(key, *rest) for rest in places(document[key])]
    return found


@st.composite
def damaged(draw: st.DrawFn, document: Any) -> Any:
    """``document`` with one to three values replaced or removed."""
    out = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(out)))
        if not path:
            return draw(json_values)
        parent = out
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()):
            parent[path[-1]] = draw(json_values)
        else:
            del parent[path[-1]]
    return out
