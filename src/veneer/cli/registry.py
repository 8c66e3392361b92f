"""``veneer registry``: the embedded registry."""

import errno
import os
import signal
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.command import Command, CommonArguments, Invocation, group_of
from veneer.cli.parser import Parser, directory, existing_file
from veneer.errors import UsageError

if TYPE_CHECKING:
    from veneer.serve.registry import BasicAuth, TokenAuth

__all__ = ["COMMAND"]

_MAX_PORT = 65535


class ServeArguments(CommonArguments):
    """What ``veneer registry serve`` takes."""

    dir: Path
    host: str
    port: int
    auth: list[str]
    tls_cert: Path | None
    tls_key: Path | None
    print_requests: bool
    ready_fd: int | None


def add_serve_arguments(parser: Parser) -> None:
    """Declare them."""
    parser.add_word("DIR", type=directory)
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="Address to listen on. [default: %(default)s]")
    add(
        "--port",
        type=int,
        default=5000,
        metavar="NUMBER",
        help="Port; 0 takes a free one. [default: %(default)s]",
    )
    add(
        "--auth",
        action="append",
        default=[],
        metavar="USER:PASSWORD|token",
        help="A user that may do everything; may be repeated. With 'token' as well: Bearer tokens in place of "
        "Basic, and without a user everybody may pull. Better in the environment, as VENEER_REGISTRY_AUTH.",
    )
    add("--tls-cert", type=existing_file, metavar="FILE", help="Certificate chain (PEM); serves https.")
    add("--tls-key", type=existing_file, metavar="FILE", help="Its key (PEM), when it is not in the same file.")
    add("--print-requests", action="store_true", help="A line for every request, on standard error.")
    add("--ready-fd", type=int, metavar="N", help="Write the URL to this descriptor when ready, and close it.")


def serve(invocation: Invocation, args: ServeArguments) -> int:
    """Serve DIR until interrupted.

    Repository a/b is the OCI layout DIR/a/b, made by the first push to it. When DIR is an OCI layout itself,
    it is the only repository, with the name of the directory.
    """
    import trio

    from veneer.serve.registry import RequestRecord, serve_registry

    if not 0 <= args.port <= _MAX_PORT:
        raise UsageError(f"--port {args.port} is not between 0 and {_MAX_PORT}")
    authorizer = _authorizer(args.auth or os.environ.get("VENEER_REGISTRY_AUTH", "").split())
    tls = _tls(args.tls_cert, args.tls_key)
    say = invocation.output.say

    def show(record: RequestRecord) -> None:
        if args.print_requests:
            wanted = f" [{record.range}]" if record.range else ""
            status = record.status or "no answer"
            say(f"{record.method} {record.path}{wanted} {status} {record.bytes_sent} bytes")

    async def run() -> None:
        async with serve_registry(
            args.dir, host=args.host, port=args.port, auth=authorizer, tls=tls, on_response=show
        ) as server:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                url = f"{'https' if tls else 'http'}://{server.host}"
                say(f"serving {args.dir} on {url}")
                if invocation.output.json:
                    invocation.output.result({"directory": str(args.dir), "url": url}, "")
                if args.ready_fd is not None:
                    _announce(args.ready_fd, url)
                async for _ in signals:
                    # Out of this block the next signal ends the process at once, transfers or not.
                    return

    try:
        invocation.run(run)
    except OSError as error:
        raise UsageError(
            f"cannot serve {args.dir} on {args.host}:{args.port}: {error.strerror}",
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


COMMAND = group_of(
    "Serve a directory of OCI image layouts as a registry.",
    {"serve": Command(serve, ServeArguments, add_serve_arguments)},
)
