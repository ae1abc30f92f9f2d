"""Which driver makes control groups, by what the settings say and what answers."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from tare.cgroups import choose as module
from tare.cgroups.choose import Driver, choose
from tare.cgroups.layout import Layout, detect
from tare.cgroups.systemd import Systemd
from tare.config import load
from tare.errors import FailedPrecondition, InvalidArgument

ROOT = "/sys/fs/cgroup"


def chosen(driver: Driver, run: Path) -> str:
    async def body() -> str:
        groups = await choose(driver, ROOT, run)
        await groups.leave()
        groups.close()
        return groups.driver

    return asyncio.run(body())


@pytest.fixture(name="second")
def _second(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A node with v2 alone that systemd has booted, and on which nothing answers."""
    found = detect()
    pure = Layout(kind="v2", hierarchies=found.hierarchies[-1:])
    monkeypatch.setattr("tare.cgroups.core.detect", lambda _: pure)
    monkeypatch.setattr(module, "BOOTED", tmp_path)
    monkeypatch.setattr(Systemd.__init__, "__defaults__", ((f"unix:path={tmp_path}/bus",), 5.0))


async def answer(_: Systemd) -> int:
    return 252


def test_directories_are_made_where_that_is_asked_for_or_nothing_else_can_be(
    second: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert chosen("cgroupfs", tmp_path) == "cgroupfs"
    with caplog.at_level(logging.WARNING):
        assert chosen("auto", tmp_path) == "cgroupfs"
    assert "control groups are made as directories" in caplog.text and "no systemd is to be reached" in caplog.text
    monkeypatch.setattr(module, "BOOTED", tmp_path / "none")
    monkeypatch.setattr(Systemd, "version", answer)
    assert chosen("auto", tmp_path) == "cgroupfs"


def test_systemd_is_taken_where_it_answers(second: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Systemd, "version", answer)
    assert chosen("auto", tmp_path) == chosen("systemd", tmp_path) == "systemd"


def test_systemd_that_is_asked_for_and_does_not_answer_is_an_error(second: None, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"no systemd is to be reached.*set the cgroup driver to cgroupfs"):
        chosen("systemd", tmp_path)


def test_the_setting(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[runtime]\ncgroup_driver = "systemd"\n')
    assert load(str(file)).runtime.cgroup_driver == "systemd"
    file.write_text('[runtime]\ncgroup_driver = "kubelet"\n')
    with pytest.raises(InvalidArgument, match=r"kubelet.*runtime\.cgroup_driver"):
        load(str(file))
