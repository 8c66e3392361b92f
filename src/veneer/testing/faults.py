"""Which faults a scripted server commits, for which requests, and how often.

A :class:`FaultScript` is a middleware made of rules. They are looked at in the order they were added; every
rule that matches a request acts on it, the first one outermost. Nothing is random: a test that fails, fails
again. The faults themselves are in :mod:`veneer.testing.actions`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from veneer.serve.message import Handler, Request, Response
from veneer.testing.actions import Action

__all__ = ["FaultScript", "Rule"]


def _any_request(_request: Request) -> bool:
    return True


@dataclass(slots=True)
class Rule:
    """One action and the requests it is for; made by :meth:`FaultScript.add`.

    ``seen`` counts the requests that matched, ``hits`` those among them that were acted on.
    """

    action: Action
    method: str
    path: re.Pattern[str]
    when: Callable[[Request], bool]
    nth: int
    count: int | None
    seen: int = 0
    hits: int = 0

    def takes(self, request: Request) -> bool:
        """Count the request when it matches; whether to act on it."""
        if self.method and request.method != self.method:
            return False
        if not (self.path.search(request.path) and self.when(request) and self.action.concerns(request)):
            return False
        self.seen += 1
        acts = self.seen >= self.nth and (self.count is None or self.hits < self.count)
        self.hits += acts
        return acts


class FaultScript:
    """The rules of one server. May be changed at any time; a request sees the rules of when it arrived."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []

    def add(
        self,
        action: Action,
        *,
        method: str = "",
        path: str = "",
        when: Callable[[Request], bool] = _any_request,
        nth: int = 1,
        count: int | None = 1,
    ) -> Rule:
        """Add a rule.

        Args:
            action: what goes wrong.
            method: upper case; "" is any.
            path: a regular expression that is searched for in the decoded path.
            when: a further condition.
            nth: the first matching request that is acted on, counted from 1.
            count: how many are acted on from there; None is all of them.
        """
        rule = Rule(action, method, re.compile(path), when, nth, count)
        self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Remove all rules: from now on everything is well."""
        self.rules.clear()

    def wrap(self, handler: Handler) -> Handler:
        """The handler, with the faults of this script around it."""

        async def handle(request: Request) -> Response:
            proceed = handler
            for rule in reversed([rule for rule in self.rules if rule.takes(request)]):
                proceed = _bind(rule.action, proceed)
            return await proceed(request)

        return handle


def _bind(action: Action, proceed: Handler) -> Handler:
    async def handle(request: Request) -> Response:
        return await action.respond(request, proceed)

    return handle
