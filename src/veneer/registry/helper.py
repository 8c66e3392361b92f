"""Asking a credential helper, a program ``docker-credential-NAME``, for the credential of one server.

The protocol is that of docker-credential-helpers: ``get``, the server on standard input, a JSON object on
standard output. What a helper prints is a secret or may hold one: it is never repeated in a message.
"""

import re
import subprocess

import trio

from veneer.errors import UsageError, VeneerError
from veneer.oci.canonical import parse_json
from veneer.registry.credential import Credential

__all__ = ["ask_helper"]

#: Helpers of clouds call their cloud; one that waits for a person at a prompt must not hang a mount.
HELPER_TIMEOUT_S = 30.0
#: The largest real answers are identity tokens of a few KiB.
_MAX_OUTPUT = 1 << 20
#: A name is looked up on PATH: it must not be able to name a file elsewhere.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: What helpers print when they work but have nothing for this server.
_NOT_FOUND = (
    b"credentials not found in native keychain",
    b"no credentials server URL",
    b"no credentials username",
)
#: In place of a user name: the secret is an identity token.
_TOKEN_USER = "<token>"


async def ask_helper(name: str, server: str) -> Credential | None:
    """The credential that helper ``name`` has for ``server``, None when it has none.

    Raises UsageError when the helper is missing, fails, takes too long or does not speak the protocol.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "a credential helper's name may only have letters, digits, dots, dashes and underscores"
        )
    program = f"docker-credential-{name}"
    try:
        with trio.fail_after(HELPER_TIMEOUT_S):
            done = await trio.run_process(
                [program, "get"], stdin=server.encode(), capture_stdout=True, capture_stderr=True, check=False
            )
    except trio.TooSlowError:
        raise UsageError(
            f"{program} gave no answer within {HELPER_TIMEOUT_S:g} s",
            hint=f"try it by hand: echo {server} | {program} get",
        ) from None
    except OSError as error:
        raise UsageError(
            f"cannot run {program}: {(error.strerror or 'unknown error').lower()}",
            hint=f"install {program}, or remove it from the configuration of credentials",
        ) from error
    return _parse(done, program, server)


def _parse(done: "subprocess.CompletedProcess[bytes]", program: str, server: str) -> Credential | None:
    if done.returncode != 0:
        if done.stdout.strip() in _NOT_FOUND:
            return None
        raise UsageError(
            f"{program} failed for {server} with status {done.returncode}",
            hint=f"try it by hand: echo {server} | {program} get",
        )
    try:
        answer = parse_json(done.stdout, "answer", limit=_MAX_OUTPUT)
    except VeneerError:
        answer = None  # the error would describe the output
    if isinstance(answer, dict):
        username, secret = answer.get("Username"), answer.get("Secret")
        if isinstance(username, str) and isinstance(secret, str) and secret:
            token = username == _TOKEN_USER
            return Credential("" if token else username, secret, identity_token=token)
    raise UsageError(f"{program} does not speak the protocol of credential helpers")
