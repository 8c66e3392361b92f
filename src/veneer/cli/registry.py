"""``veneer registry``: the embedded registry."""

import errno
import os
import signal
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from veneer.cli.command import EXIT_STATUS, Invocation, command
from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.serve.registry import BasicAuth, TokenAuth

__all__ = ["registry"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DIRECTORY = click.Path(file_okay=False, path_type=Path)


@click.group()
def registry() -> None:
    """Serve a directory of OCI image layouts as a registry."""


@registry.command("serve", epilog=EXIT_STATUS)
@command
@click.argument("directory", metavar="DIR", type=_DIRECTORY)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option(
    "--port", default=5000, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option(
    "--auth",
    multiple=True,
    envvar="VENEER_REGISTRY_AUTH",
    metavar="USER:PASSWORD|token",
    help="A user that may do everything; may be repeated. With 'token' as well: Bearer tokens in place of "
    "Basic, and without a user everybody may pull. Better in the environment, as VENEER_REGISTRY_AUTH.",
)
@click.option("--tls-cert", type=_FILE, help="Certificate chain (PEM); serves https.")
@click.option("--tls-key", type=_FILE, help="Its key (PEM), when it is not in the same file.")
@click.option("--print-requests", is_flag=True, help="A line for every request, on standard error.")
@click.option(
    "--ready-fd", type=int, metavar="N", help="Write the URL to this descriptor when ready, and close it."
)
def serve(
    invocation: Invocation,
    *,
    directory: Path,
    host: str,
    port: int,
    auth: Sequence[str],
    tls_cert: Path | None,
    tls_key: Path | None,
    print_requests: bool,
    ready_fd: int | None,
) -> int:
    """Serve DIR until interrupted.

    Repository a/b is the OCI layout DIR/a/b, made by the first push to it. When DIR is an OCI layout itself,
    it is the only repository, with the name of the directory.
    """
    import trio

    from veneer.serve.registry import RequestRecord, serve_registry

    authorizer, tls = _authorizer(auth), _tls(tls_cert, tls_key)
    say = invocation.output.say

    def show(record: RequestRecord) -> None:
        if print_requests:
            wanted = f" [{record.range}]" if record.range else ""
            status = record.status or "no answer"
            say(f"{record.method} {record.path}{wanted} {status} {record.bytes_sent} bytes")

    async def run() -> None:
        async with serve_registry(
            directory, host=host, port=port, auth=authorizer, tls=tls, on_response=show
        ) as server:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                url = f"{'https' if tls else 'http'}://{server.host}"
                say(f"serving {directory} on {url}")
                if invocation.output.json:
                    invocation.output.result({"directory": str(directory), "url": url}, "")
                if ready_fd is not None:
                    _announce(ready_fd, url)
                async for _ in signals:
                    # Out of this block the next signal ends the process at once, transfers or not.
                    return

    try:
        invocation.run(run)
    except OSError as error:
        raise UsageError(
            f"cannot serve {directory} on {host}:{port}: {error.strerror}",
            hint="choose another --port, or 0 for a free one" if error.errno == errno.EADDRINUSE else None,
        ) from error
    return 0


def _announce(descriptor: int, url: str) -> None:
    try:
        os.write(descriptor, f"{url}\n".encode())
        os.close(descriptor)
    except OSError as error:
        raise UsageError(f"cannot write to --ready-fd {descriptor}: {error.strerror}") from error


def _authorizer(values: Sequence[str]) -> "BasicAuth | TokenAuth | None":
    from veneer.serve.registry import BasicAuth, TokenAuth

    users = {}
    for value in values:
        user, colon, password = value.partition(":")
        if value == "token":
            continue
        if not (user and colon and password):
            raise UsageError("--auth is neither USER:PASSWORD nor the word token")
        users[user] = password
    if "token" in values:
        return TokenAuth(users, anonymous_pull=not users)
    return BasicAuth(users) if users else None


def _tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None:
        if key is not None:
            raise UsageError("--tls-key needs --tls-cert")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"cannot use {certificate}: {error.strerror or error}") from error
    return context
