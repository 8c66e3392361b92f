"""HTTP as the rest of veneer sees it: one request, one streamed answer, one retry policy, one error tree.

:mod:`veneer.transport.http` is the only module that imports httpx; nothing here knows what a registry is.
"""

import sys

# Where click is installed httpx imports a command line of its own, with rich and pygments: a tenth of the time
# that our commands take to start. None makes that import fail, which httpx is prepared for.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type] # as the import system documents

from veneer.transport.connections import Connections
from veneer.transport.http import Request, Response, Transport
from veneer.transport.retry import Attempts, Patience, TransportStats

__all__ = ["Attempts", "Connections", "Patience", "Request", "Response", "Transport", "TransportStats"]
