"""The default AppArmor profile, by what this kernel has: loaded and enforced, or nothing to load."""

from __future__ import annotations

from pathlib import Path

import pytest

from tare.runtime import apparmor, labels
from tests.support.launch import Launch, in_launch

pytestmark = pytest.mark.root


def test_the_default_profile(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        await apparmor.load(launch.handler.commands, labels.kernel())
        node = labels.kernel()
        if node.profiles is None:
            assert labels.apparmor_profile(None, node, privileged=False) == ""
            return
        profile = labels.apparmor_profile(None, node, privileged=False)
        assert profile == labels.APPARMOR_DEFAULT
        script = "cat /proc/self/attr/current; (echo h > /proc/sysrq-trigger) 2>/dev/null || echo closed; echo x > /tmp/x && echo open"
        result = await launch.run(["sh", "-c", script], apparmorProfile=profile, linux={"readonlyPaths": []})
        assert result.out.splitlines() == [f"{profile} (enforce)", "closed", "open"]
        box = await launch.start(["sleep", "1000"], apparmorProfile=profile)
        await launch.kill(box)

    in_launch(tmp_path, body)
