"""Why a connection could not be made: what lies under an exception of the HTTP library, in words for users.

Pure. Looks only at the standard library's exceptions in the chain, never at message texts.
"""

import os
import socket
import ssl
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Diagnosis", "diagnose_connection"]

_Error = TypeVar("_Error", bound=BaseException)
#: Chains of three to six are usual; more can only be a cycle.
_MAX_CHAIN = 16


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A reason in words.

    Args:
        text: what happened.
        temporary: whether trying again may help.
        hint: what the user can do; ``{host}`` stands for the host.
        untrusted: the host speaks TLS, with a certificate that is not trusted here.
    """

    text: str
    temporary: bool
    hint: str | None = None
    untrusted: bool = False


def diagnose_connection(error: BaseException) -> Diagnosis:
    """Why no connection came about."""
    if certificate := _beneath(error, ssl.SSLCertVerificationError):
        return Diagnosis(
            f"its certificate is not trusted: {certificate.verify_message}",
            temporary=False,
            hint="give the certificate of a private authority with --ca-file (or VENEER_CA_FILE)",
            untrusted=True,
        )
    if tls := _beneath(error, ssl.SSLError):
        return Diagnosis(
            f"no TLS connection: {(tls.reason or 'protocol error').replace('_', ' ').lower()}",
            temporary=False,
            hint="if {host} speaks plain HTTP and the way to it is safe, name it with --insecure {host}",
        )
    if unknown := _beneath(error, socket.gaierror):
        return Diagnosis(
            f"its name was not resolved: {(unknown.strerror or 'unknown name').lower()}",
            temporary=True,
            hint="check the name {host} and this machine's DNS",
        )
    system = _beneath(error, OSError)
    # strerror of a connection error repeats the address; the number's own text does not.
    why = os.strerror(system.errno).lower() if system and system.errno else "it broke while being made"
    return Diagnosis(
        f"no connection: {why}",
        temporary=True,
        hint="check that {host} is right and reachable, and whether a proxy is needed (HTTPS_PROXY)",
    )


def _beneath(error: BaseException, kind: type[_Error]) -> _Error | None:
    """The deepest exception of ``kind`` under ``error``: it is the one nearest to the cause."""
    found: _Error | None = None
    at: BaseException | None = error
    for _ in range(_MAX_CHAIN):
        if isinstance(at, kind):
            found = at
        if at is None:
            break
        at = at.exceptions[0] if isinstance(at, BaseExceptionGroup) else at.__cause__ or at.__context__
    return found
