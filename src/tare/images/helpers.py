"""Credential helpers of the daemon's `auth_file`: programs docker-credential-NAME, run by the launcher, since the daemon starts no processes.

The protocol is that of docker-credential-helpers ("get"): the server's address goes in, user and secret come out. What a helper
writes is never shown.
"""

from __future__ import annotations

import os
import shutil

from tare.errors import TareError
from tare.handlers.commands import CAPTURE, ENVIRONMENT, Commands, Said
from tare.images.auth import RegistryAuth
from tare.images.docker_config import AuthFileError, answered, is_absent

SECONDS = 30.0


async def ask(commands: Commands | None, name: str, address: str) -> RegistryAuth | None:
    """The credentials that docker-credential-NAME has for a server, None where it has none. Raises AuthFileError.

    It runs with the daemon's own environment, in which its operator may have put what it needs.
    """
    program = f"docker-credential-{name}"
    doing, environment = f"ask {program} for credentials", {**ENVIRONMENT, **os.environ}
    path = None if "/" in name else shutil.which(program, path=environment["PATH"])
    if path is None:
        raise AuthFileError(doing, cause="it is not in the daemon's PATH", hint="install it, or change auth_file")
    if commands is None:
        raise AuthFileError(doing, cause="there is nobody here to run it")
    try:
        with Said(CAPTURE) as output:
            ended = await commands.run(
                [path, "get"], env=environment, stdin=address.encode(), stdout=output.end, timeout=SECONDS
            )
            text = output.text().encode()
    except TareError as error:
        raise AuthFileError(doing, cause=error) from error
    if ended.code == 0:
        return answered(text, address)
    if is_absent(text):
        return None
    raise AuthFileError(doing, cause=f"it ended with code {ended.code}")
