"""Failpoints: where a test can say that a process dies or a step fails, exactly there.

TARE_FAILPOINTS holds rules parted by commas: `OPERATION.STEP.WHEN=ACTION`, WHEN being before or after, ACTION being

    kill            this process is killed with SIGKILL
    error           the step fails with an InternalError
    NAME            the handler registered under NAME is awaited (`on`), e.g. `kill-launcher`

A rule fires once. Without the variable a failpoint costs a look into an empty dictionary.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable

from tare.errors import InternalError

_actions: dict[str, Callable[[], Awaitable[None]]] = {}


def parse(text: str) -> dict[str, str]:
    """Rules by the place they name. Raises ValueError for a rule without an action."""
    rules = {}
    for rule in filter(None, (part.strip() for part in text.split(","))):
        place, mark, action = rule.partition("=")
        if not mark or not action or place.count(".") < 2:
            raise ValueError(f"failpoint {rule!r} is not OPERATION.STEP.WHEN=ACTION")
        rules[place] = action
    return rules


_rules = parse(os.environ.get("TARE_FAILPOINTS", ""))


def on(action: str, handler: Callable[[], Awaitable[None]]) -> None:
    """Give an action's name a meaning."""
    _actions[action] = handler


async def failpoint(operation: str, step: str, when: str) -> None:
    """Do what the rule for this place says, if there is one."""
    if not _rules:
        return
    action = _rules.pop(f"{operation}.{step}.{when}", None)
    if action is None:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "error":
        raise InternalError(f"failpoint {operation}.{step}.{when}")
    await _actions[action]()
