"""Classes of service (linux.intelRdt) by the daemon's engine and by `tare oci`, on what looks like resctrl (`tests.support.resctrl`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tare
from tare.errors import FailedPrecondition
from tare.handlers import rdt
from tests.support.launch import Box, Launch, in_launch, line
from tests.support.oci import Bundle, Runtime
from tests.support.resctrl import Resctrl, resctrl

pytestmark = pytest.mark.root

SPEAK = ["sh", "-c", "echo up; sleep 1000"]
OWN = {"l3CacheSchema": "L3:0=f;1=f0", "memBwSchema": "MB:0=50;1=20", "enableMonitoring": True}
SHARES = {"L3": {"0": 0xF, "1": 0xF0}, "MB": {"0": 50, "1": 20}}
# `tare oci` as its script starts it, told where resctrl is.
COMMAND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
where = sys.argv.pop(1)
from tare.handlers import rdt
rdt.mounted_at = lambda mountinfo: where
from tare.oci.main import main
main(sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1], "")
"""


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Resctrl]:
    """It is where nobody would look for it."""
    with resctrl(tmp_path / "resctrl") as served:
        monkeypatch.setattr(rdt, "mounted_at", lambda mountinfo: str(tmp_path / "resctrl"))
        yield served


def tasks(served: Resctrl, path: str) -> list[int]:
    """Who is in a class, or a group of counters."""
    group = served.group(path)
    assert group is not None, path
    return group.tasks


async def begin(launch: Launch, **wanted: object) -> Box:
    """A container with a share that runs."""
    box = await launch.start(SPEAK, linux={"intelRdt": wanted})
    assert await line(box) == "up"
    return box


async def end(launch: Launch, box: Box) -> None:
    """It is gone, with all that was made for it."""
    await launch.kill(box)
    await launch.handler.hooked.release(box.id)


def test_a_class_of_its_own(tmp_path: Path, mounted: Resctrl) -> None:
    async def body(launch: Launch) -> None:
        box = await begin(launch, **OWN)
        made = mounted.group(box.id)
        assert made is not None and made.schemata == SHARES
        assert tasks(mounted, box.id) == tasks(mounted, f"{box.id}/mon_groups/{box.id}") == [box.process.pid]
        await end(launch, box)
        assert mounted.group(box.id) is None

    in_launch(tmp_path, body)


def test_a_class_that_several_share(tmp_path: Path, mounted: Resctrl) -> None:
    """It is there before them, and stays; each has its own counters."""
    (tmp_path / "resctrl/gold").mkdir()

    async def body(launch: Launch) -> None:
        boxes = [await begin(launch, closID="gold", enableCMT=True) for _ in range(2)]
        assert tasks(mounted, "gold") == [box.process.pid for box in boxes]
        for box in boxes:
            assert tasks(mounted, f"gold/mon_groups/{box.id}") == [box.process.pid]
            await end(launch, box)
        left = mounted.group("gold/mon_groups")
        assert left is not None and left.children == {}

    in_launch(tmp_path, body)


def test_a_class_by_name_is_made_and_stays(tmp_path: Path, mounted: Resctrl) -> None:
    """And whoever asks for it with other shares is refused."""

    async def body(launch: Launch) -> None:
        box = await begin(launch, closID="silver", **OWN)
        with pytest.raises(FailedPrecondition, match="does not say"):
            await begin(launch, closID="silver", l3CacheSchema="L3:0=1")
        await end(launch, box)
        kept = mounted.group("silver")
        assert kept is not None and kept.schemata == SHARES

    in_launch(tmp_path, body)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"l3CacheSchema": "L3:0=fffff"}, "Unknown or unsupported value in L3:0=fffff"),
        ({"closID": "bronze"}, "does not exist"),
    ],
)
def test_what_cannot_be_had_leaves_nothing(
    wanted: dict[str, object], words: str, tmp_path: Path, mounted: Resctrl
) -> None:
    async def body(launch: Launch) -> None:
        with pytest.raises(FailedPrecondition, match=words):
            await begin(launch, **wanted)
        assert set(mounted.root.children or {}) == {"schemata", "tasks", "mon_groups", "info"}
        assert not list((launch.run_directory / "tasks").iterdir())
        assert (await launch.run(["true"])).code == 0

    in_launch(tmp_path, body)


def test_by_the_command(tmp_path: Path, mounted: Resctrl) -> None:
    """Created, started, deleted."""
    runtime = Runtime("tare", tmp_path / "root")
    program = [sys.executable, "-ISE", "-c", COMMAND, str(Path(tare.__file__).parents[1]), str(tmp_path / "resctrl")]
    runtime.argv = lambda *words: [*program, "--root", str(runtime.root), *words]  # type: ignore[method-assign]
    bundle = Bundle(tmp_path / "bundle")
    bundle.linux["intelRdt"] = OWN
    bundle.write("sleep", "1000")
    name = runtime.name_one()
    try:
        runtime.quietly("create", "--bundle", str(bundle.path), name, cwd=tmp_path)
        pid = int(runtime.state(name)["pid"])
        made = mounted.group(name)
        assert made is not None and made.schemata == SHARES
        assert tasks(mounted, name) == tasks(mounted, f"{name}/mon_groups/{name}") == [pid]
        runtime.call("start", name)
        assert tasks(mounted, name) == [pid]
        runtime.call("delete", "--force", name)
        assert mounted.group(name) is None
    finally:
        runtime.call("delete", "--force", name)
