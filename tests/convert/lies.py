"""Sidecars that nothing can tell from right ones until a layer is complete, or a tree is decoded."""

import pytest

from veneer.convert.sidecar import IndexedImage, make_sidecar
from veneer.convert.stretches import _WindowWriter
from veneer.prefetch.profile import Profile
from veneer.settings import Settings


async def a_lie(
    reference: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, *profiles: Profile
) -> IndexedImage:
    """Push a sidecar of a gzip image with windows that are not what lies before their spans.

    What the text of its files says there, ``words``, becomes ``liars``.
    """
    honest, table = _WindowWriter.add, bytes.maketrans(b"words", b"liars")
    with monkeypatch.context() as patch:
        patch.setattr(_WindowWriter, "add", lambda self, window: honest(self, window.translate(table)))
        return await make_sidecar(reference, settings, push=True, profiles=profiles)


async def a_stump(reference: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> IndexedImage:
    """Push a sidecar that has no tree where trees are."""
    with monkeypatch.context() as patch:
        patch.setattr("veneer.index.wire.encode_tree", lambda *_: b"nonsense")
        return await make_sidecar(reference, settings, push=True)
