"""A user name and secret for a registry."""

import base64
from dataclasses import dataclass, field

__all__ = ["Credential"]


@dataclass(frozen=True, slots=True)
class Credential:
    """What a user logs in to a registry with. Its repr shows no secret.

    Args:
        username: "" for identity tokens.
        secret: a password, or an identity token.
        identity_token: whether ``secret`` is an OAuth 2 refresh token, good only for the token service.
    """

    username: str
    secret: str = field(repr=False)
    identity_token: bool = False

    @property
    def basic(self) -> str:
        """The value of an Authorization header with this user name and secret."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.secret}".encode()).decode("ascii")
