"""TLS contexts: made when a connection needs one, then shared until certificates change."""

import ssl
from pathlib import Path

import pytest
import trustme

from tests.transport.settings import settings_in
from veneer.transport import Transport
from veneer.transport.tls import tls_context


def authority(path: Path) -> None:
    path.write_bytes(trustme.CA().cert_pem.bytes())


async def test_without_a_request_no_certificates_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssl, "create_default_context", lambda: pytest.fail("read"))
    async with Transport(settings_in(tmp_path)):
        pass


def test_one_context_serves_all_until_the_file_changes(tmp_path: Path) -> None:
    path, other = tmp_path / "ca.pem", tmp_path / "other.pem"
    authority(path)
    authority(other)
    first = tls_context(path)
    assert tls_context(path) is first
    assert tls_context(other) is not first
    assert tls_context(None) is not first
    other.replace(path)
    second = tls_context(path)
    assert second is not first
    assert set(second.get_ca_certs(binary_form=True)) != set(first.get_ca_certs(binary_form=True))


def test_the_system_s_certificates_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, newer = tmp_path / "system.pem", tmp_path / "newer.pem"
    authority(path)
    authority(newer)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    first = tls_context(None)
    newer.replace(path)
    second = tls_context(None)
    assert first.get_ca_certs() != second.get_ca_certs()
