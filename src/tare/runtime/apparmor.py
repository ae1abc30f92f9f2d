"""The AppArmor profile that a container has where no other is asked for: its text, and how the kernel comes to know it.

It is loaded, or replaced by this version's, when a daemon begins, by the node's own apparmor_parser. Where that cannot be done the daemon
says why and serves all the same; a container that asks for the runtime's default is then refused (`labels`), never unconfined.

Source: apparmor.d(5), apparmor_parser(8).
"""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

from tare.errors import TareError, describe
from tare.runtime.labels import APPARMOR_DEFAULT, Kernel

if TYPE_CHECKING:
    from tare.handlers.commands import Commands

log = logging.getLogger(__name__)

PROGRAM = "apparmor_parser"
DIRECTORIES = "/usr/sbin:/sbin:/usr/bin:/bin"
OPTIONS = ("--replace", "--skip-cache", "--quiet")
SECONDS = 20.0

PROFILE = f"""
profile {APPARMOR_DEFAULT} flags=(attach_disconnected, mediate_deleted) {{
  file,
  network,
  capability,
  unix,
  dbus,
  umount,
  deny mount,

  # from the node's processes, which are unconfined, and among containers
  signal (receive) peer=unconfined,
  signal (send, receive) peer={APPARMOR_DEFAULT},
  ptrace (trace, tracedby, read, readby) peer={APPARMOR_DEFAULT},

  # what is the whole kernel's, where neither masks nor read-only mounts hide it (an unmasked /proc)
  deny /proc/{{kcore,kmem,mem,sysrq-trigger}} rwklx,
  deny /proc/{{acpi,bus,fs,irq,scsi}}/** wklx,
  deny /proc/sys/{{abi,crypto,debug,dev,sunrpc,vm}}/** wklx,
  deny /proc/sys/fs/[^m]** wklx,
  # of kernel.* all but what is the container's own: domainname, hostname, msg*, sem, sem_*, shm*
  deny /proc/sys/kernel/[^dhms]** wklx,
  deny /proc/sys/kernel/{{d[^o]**,h[^o]**,ho[^s]**,m[^s]**,ms[^g]**,s[^eh]**,se[^m]**,sem[^_]**,sh[^m]**}} wklx,
  deny /sys/[^f]** wklx,
  deny /sys/f[^s]** wklx,
  deny /sys/fs/[^c]** wklx,
  deny /sys/{{firmware,kernel/security}}/** rwklx,
}}
"""


async def load(commands: Commands, node: Kernel) -> None:
    """Have the kernel know it, where it has AppArmor."""
    if node.profiles is None:
        return
    program = shutil.which(PROGRAM, path=DIRECTORIES)
    if program is None:
        complain(f"there is no {PROGRAM} in {DIRECTORIES}")
        return
    try:
        ended = await commands.run([program, *OPTIONS], stdin=PROFILE.encode(), timeout=SECONDS)
    except TareError as error:
        complain(describe(error))
        return
    if ended.code:
        complain(f"{program} ended with {ended.code}: {ended.words}")


def complain(why: str) -> None:
    """To the log."""
    log.warning("the AppArmor profile %s could not be loaded: %s", APPARMOR_DEFAULT, why)
