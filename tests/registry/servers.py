"""Real registries for tests."""

import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from subprocess import DEVNULL

import trio

from veneer.registry.client import RegistryRepository
from veneer.registry.keychain import Keychain
from veneer.settings import Settings
from veneer.transport import Transport

_CONFIG = """\
version: 0.1
log: {{level: error}}
storage:
  filesystem: {{rootdirectory: {root}}}
  delete: {{enabled: true}}
http: {{addr: "{address}", secret: test}}
"""


def repository_at(host: str, name: str, transport: Transport, settings: Settings) -> RegistryRepository:
    """A repository with the given name, credentials from the settings."""
    return RegistryRepository(host, name, transport=transport, keychain=Keychain(settings), settings=settings)


@asynccontextmanager
async def docker_registry(directory: Path) -> AsyncIterator[str]:
    """Debian's ``docker-registry`` on a free port; gives its ``host:port``."""
    program = shutil.which("docker-registry")
    assert program, "install the package docker-registry"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    config = directory / "registry.yml"
    config.write_text(_CONFIG.format(root=directory / "registry", address=host))
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, stdout=DEVNULL, stderr=DEVNULL, check=False)
        process: trio.Process = await nursery.start(run, [program, "serve", os.fspath(config)])
        with trio.fail_after(60):
            await _listening(host)
        try:
            yield host
        finally:
            process.kill()


async def _listening(host: str) -> None:
    address, port = host.rsplit(":", 1)
    while True:
        try:
            stream = await trio.open_tcp_stream(address, int(port))
        except OSError:
            await trio.sleep(0.02)  # waiting for another program to start, nothing to be told by
        else:
            await stream.aclose()
            return
