"""Notes of indexes that are wrong: what is damaged of them refutes nothing, and is written anew."""

from pathlib import Path

import pytest

from veneer.formats.refuted import Refutations
from veneer.oci.digest import Digest

INDEX, MANIFEST, LAYER = (Digest.of(name) for name in (b"index", b"manifest", b"layer"))


@pytest.mark.parametrize("damage", [b"", b"{", b"{}", b"[]", b'{"seen": 1}', b"\xff", b" " * 20_000], ids=repr)
def test_a_damaged_note_refutes_nothing_until_it_is_written_again(tmp_path: Path, damage: bytes) -> None:
    refutations = Refutations(tmp_path)
    refutations.add(INDEX, MANIFEST, LAYER, "other contents")
    (note,) = tmp_path.iterdir()
    note.write_bytes(damage)
    assert refutations.find(INDEX) is None
    refutations.add(INDEX, MANIFEST, LAYER, "x" * 100_000)
    found = refutations.find(INDEX)
    assert found is not None
    assert f"index {INDEX} was refuted" in found.error(INDEX).message
    assert refutations.find(MANIFEST) is None
