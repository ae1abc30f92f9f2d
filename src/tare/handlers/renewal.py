"""Keeper and launcher as a daemon finds them: started where there is none, and of its own version, with all that they have.

Of another version, they make way for this one themselves, in place, once they have tried it (`launch.succession`). Where that does not
work they serve on as they are, as long as both sides understand each other.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from tare.errors import FailedPrecondition, Unavailable
from tare.handlers import interpreter
from tare.handlers.channel import Channel, Refused, text
from tare.handlers.manager import Manager
from tare.launch import wire

log = logging.getLogger(__name__)
KEEPER_START = 30.0
KEEPER_RETRY = 1.0
PAUSE = 0.005
TIMEOUT = 60.0  # longer than a trial may take, and the launcher's quiet moment


@dataclass(frozen=True, slots=True)
class Greeting:
    """Who has answered: the version of its wire protocol, the oldest that it speaks with, and the identity of its code ("" is unknown)."""

    version: int
    oldest: int
    identity: str

    @property
    def speaks(self) -> bool:
        """Whether it and this daemon understand each other."""
        return self.version >= wire.OLDEST and self.oldest <= wire.VERSION


async def reach(run: Path, keeper: Channel, launcher: Channel, manager: Manager) -> str:
    """Have a keeper and a launcher that answer, of this version: "", or why they are of another one.

    Raises Unavailable, InternalError, DeadlineExceeded, FailedPrecondition.
    """
    clock = asyncio.get_running_loop().time
    again, deadline = 0.0, clock() + KEEPER_START
    while True:
        if await answers(keeper, manager):
            manager.close()
            try:
                launcher.connect()
                return await renew(keeper) or await renew(launcher)
            except (Unavailable, OSError):  # one that ends over it is followed by another
                pass
        elif clock() > again:  # one that died as it began is not heard of; where one lives, a second ends at once
            await asyncio.to_thread(interpreter.start_keeper, run, manager.kept)
            again = clock() + KEEPER_RETRY
        if clock() > deadline:
            cause = f"it does not listen after {KEEPER_START:g} s"
            raise Unavailable("start the keeper", cause=cause, hint=f"see {run}/launch.log")
        await asyncio.sleep(PAUSE)


async def answers(keeper: Channel, manager: Manager) -> bool:
    """Whether there is a keeper; it is told of the service manager."""
    try:
        await greet(keeper, manager.address, int(manager.intact))
    except Unavailable:
        return False
    return True


async def greet(channel: Channel, *more: wire.Field) -> Greeting:
    """Say HELLO. Raises Unavailable, DeadlineExceeded."""
    try:
        fields, _ = await channel.request(wire.HELLO, (wire.VERSION, *more), doing=f"greet {channel.name}", timeout=10)
    except Refused:  # a launcher that knows no HELLO
        return Greeting(1, 1, "")
    version, _, _, *rest = fields
    return Greeting(int(version), int(rest[1]) if rest[1:] else int(version), text(rest[0]) if rest else "")


async def renew(channel: Channel) -> str:
    """Have the process of this version, in place; "" or why it is of another one still.

    Raises FailedPrecondition where it does not understand this daemon, Unavailable where it ends meanwhile, DeadlineExceeded.
    """
    wanted = await asyncio.to_thread(interpreter.identity)
    found = await greet(channel)
    if found.identity == wanted:
        return ""
    doing = f"have {channel.name} make way for version {wanted}"
    words = [word.encode() for word in (wanted, *interpreter.command())]
    image = await asyncio.to_thread(interpreter.image)
    try:
        await channel.request(wire.RENEW, words, (image,), doing=doing, timeout=TIMEOUT)
    except Refused as error:
        if not found.speaks:
            hint = "stop all pods with the version that made them, and start this one again"
            raise FailedPrecondition(doing, step=error.step, cause=error.cause, hint=hint) from error
        log.warning("%s of version %s goes on: %s", channel.name, found.identity, error)
        return str(error)
    finally:
        os.close(image)
    log.info("%s of version %s has made way for %s", channel.name, found.identity, wanted)
    return ""
