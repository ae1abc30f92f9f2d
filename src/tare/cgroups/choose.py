"""Which driver makes the daemon's control groups: systemd, where it runs the node with v2, else directories are made (cgroupfs)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from tare.cgroups.manager import CgroupManager
from tare.errors import TareError, describe

log = logging.getLogger(__name__)
Driver = Literal["auto", "cgroupfs", "systemd"]
BOOTED = Path("/run/systemd/system")


def running() -> bool:
    """Whether this machine was booted by systemd (sd_booted(3))."""
    return BOOTED.is_dir()


async def choose(driver: Driver, root: str, run: Path) -> CgroupManager:
    """The groups below `root` by this driver; "auto": by systemd's if it is PID 1, answers, and v2 is what it has.

    `run` is a directory of this boot.

    Raises FailedPrecondition or Unavailable where systemd's is asked for and there is none to be reached.
    """
    groups = CgroupManager(root, owner=str(run))
    if driver == "cgroupfs" or (driver == "auto" and (groups.layout != "v2" or not running())):
        return groups
    from tare.cgroups.scopes import SystemdGroups
    from tare.cgroups.systemd import Systemd

    systemd = Systemd()
    try:
        log.info("control groups are made by systemd %d", await systemd.version())
    except TareError as error:
        await systemd.close()
        if driver == "systemd":
            groups.close()
            raise
        log.warning("control groups are made as directories: %s", describe(error))
        return groups
    groups.close()
    return SystemdGroups(systemd, run, root)
