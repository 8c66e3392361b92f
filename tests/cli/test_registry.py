"""``veneer registry serve`` as a program: ready, serving, stopping, and what it refuses."""

import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import trustme

COMMAND = [sys.executable, "-c", "from veneer.cli.main import main; main()", "registry", "serve"]


@contextmanager
def serving(directory: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    reading, writing = os.pipe()
    command = [*COMMAND, str(directory), "--port", "0", "--ready-fd", str(writing), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, pass_fds=[writing]) as process:
        os.close(writing)
        try:
            with open(reading) as ready:
                yield process, ready.read().strip()
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path, "--print-requests") as (process, url):
        assert httpx.get(f"{url}/v2/", trust_env=False).status_code == 200
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors.splitlines() == [f"serving {tmp_path} on {url}", "GET /v2/ 200 2 bytes"]


def test_authentication_and_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate, trusted = tmp_path / "server.pem", tmp_path / "ca.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(certificate))
    authority.cert_pem.write_to_path(str(trusted))
    options = ("--auth", "ann:secret", "--auth", "token", "--tls-cert", str(certificate))
    with serving(tmp_path / "images", *options) as (_, url):
        assert url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=trusted)
        answer = httpx.get(f"{url}/v2/", verify=context, trust_env=False)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith(f'Bearer realm="{url}/token"')


def test_what_it_refuses(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, url):
        port = url.rpartition(":")[2]
        for options, message in (
            (["--port", port], "Address already in use"),
            (["--auth", "ann"], "--auth is neither"),
            (["--tls-key", __file__], "--tls-key needs --tls-cert"),
            (["--tls-cert", __file__], f"cannot use {__file__}"),
        ):
            done = subprocess.run(
                [*COMMAND, str(tmp_path), *options], capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 2
            assert message in done.stderr
            assert "Traceback" not in done.stderr
