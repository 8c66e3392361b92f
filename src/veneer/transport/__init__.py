"""HTTP as the rest of veneer sees it: one request, one streamed answer, one retry policy, one error tree.

:mod:`veneer.transport.http` is the only module that imports httpx; nothing here knows what a registry is.
"""

from veneer.transport.http import Request, Response, Transport
from veneer.transport.retry import Attempts, Patience, TransportStats

__all__ = ["Attempts", "Patience", "Request", "Response", "Transport", "TransportStats"]
