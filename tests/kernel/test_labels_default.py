"""The default AppArmor profile, by what this kernel has: loaded and enforced, or nothing to load."""

from __future__ import annotations

from pathlib import Path

import pytest

from tare.runtime import apparmor, labels
from tests.support.launch import Launch, in_launch

pytestmark = pytest.mark.root

CLOSED = (
    "/proc/sysrq-trigger",
    "/proc/sys/kernel/panic",
    "/proc/sys/kernel/sched_rt_runtime_us",
    "/proc/sys/vm/swappiness",
)
OPEN = (
    "/proc/sys/kernel/shm_rmid_forced",
    "/proc/sys/kernel/msgmax",
    "/tmp/x",
)  # the first two are the container's own
SCRIPT = "\n".join(
    [
        "cat /proc/self/attr/current",
        *(f"(echo 1 > {path}) 2>/dev/null && echo open || echo closed" for path in (*CLOSED, *OPEN)),
    ]
)


def test_the_default_profile(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        await apparmor.load(launch.handler.commands, labels.kernel())
        node = labels.kernel()
        if node.profiles is None:
            assert labels.apparmor_profile(None, node, privileged=False) == ""
            return
        profile = labels.apparmor_profile(None, node, privileged=False)
        assert profile == labels.APPARMOR_DEFAULT
        result = await launch.run(["sh", "-c", SCRIPT], apparmorProfile=profile, linux={"readonlyPaths": []})
        assert result.out.splitlines() == [f"{profile} (enforce)", *["closed"] * len(CLOSED), *["open"] * len(OPEN)]
        box = await launch.start(["sleep", "1000"], apparmorProfile=profile)
        await launch.kill(box)

    in_launch(tmp_path, body)
