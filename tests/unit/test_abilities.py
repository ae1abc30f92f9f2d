"""Trying what the kernel allows: whatever happens, the reason is told and nothing stays behind."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InternalError, Unavailable, UnknownError
from tare.handlers.plans import Mappings
from tare.runtime import abilities
from tare.runtime.abilities import PROBE, Abilities
from tare.runtime.handlers import Ability
from tare.runtime.records import ContainerConfig, ContainerMetadata, ImageRef, Mount


class Pinner:
    """Pins what is at `namespace` as a user namespace, or fails."""

    def __init__(
        self, run: Path, namespace: Path, failure: Exception | None = None, last: Exception | None = None
    ) -> None:
        self.pin = run / "pods" / PROBE / "user"
        self.namespace = namespace
        self.failure = failure
        self.last = last
        self.removals = 0

    async def pod_namespaces(self, pod_id: str, *, kinds: frozenset[str], mappings: Mappings, **_: Any) -> Any:
        assert (pod_id, kinds) == (PROBE, frozenset({"user"}))
        assert mappings.uid == mappings.gid
        if self.failure is not None:
            raise self.failure
        self.pin.symlink_to(self.namespace)
        return type("Made", (), {"pins": {"user": self.pin}})

    async def remove_pod_namespaces(self, pod_id: str, pause: object) -> None:
        self.removals += 1
        if self.removals > 1 and self.last is not None:
            raise self.last
        self.pin.unlink(missing_ok=True)


def looked(pinner: Pinner, run: Path) -> Abilities:
    handler: Any = pinner
    return asyncio.run(abilities.look(handler, run, run))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "pods").mkdir()
    return tmp_path


def test_a_user_namespace_that_cannot_be_made(run: Path) -> None:
    found = looked(
        Pinner(run, run, InternalError("make the namespaces of pod probe", cause="No space left on device")), run
    )
    assert found.user_namespaces == "make the namespaces of pod probe: No space left on device"
    assert os.listdir(run / "pods") == []


def test_what_an_earlier_try_left_behind_is_taken_away_first(run: Path) -> None:
    pinner = Pinner(run, run, InternalError("x"))
    pinner.pin.parent.mkdir()
    pinner.pin.touch()
    assert looked(pinner, run).user_namespaces == "x"
    assert os.listdir(run / "pods") == []


@pytest.mark.root
def test_a_directory_that_cannot_be_mapped_is_named(run: Path) -> None:
    found = looked(
        Pinner(run, Path("/proc/self/ns/uts")), run
    )  # the kernel takes no other namespace for a user namespace
    assert found.user_namespaces is not None
    assert found.user_namespaces.startswith(f"the file system of {run} cannot be mounted with mapped owners: ")
    assert os.listdir(run / "pods") == []


def test_a_try_that_cannot_be_taken_back_is_told_and_ends_nothing(run: Path) -> None:
    pinner = Pinner(run, run, InternalError("x"), Unavailable("reach the launcher", cause="it is gone"))
    assert looked(pinner, run).user_namespaces == "reach the launcher: it is gone"
    assert looked(Pinner(run, run, None, OSError(16, "Device or resource busy")), run).user_namespaces is not None


@pytest.mark.root
def test_read_only_mounts_of_trees(run: Path) -> None:
    assert abilities.recursive_read_only(run) is None
    assert "No such file" in str(abilities.recursive_read_only(run / "absent"))


def test_recursive_read_only_by_a_handler_that_has_it() -> None:
    mount = Mount(container_path="/m", host_path="/s", readonly=True, recursive_read_only=True)
    config = ContainerConfig(metadata=ContainerMetadata(name="main"), image=ImageRef(image="i"), mounts=(mount,))
    plain = replace(config, mounts=(replace(mount, recursive_read_only=False),))
    others = [
        Ability(name="able", recursive_read_only=True, user_namespaces=True),
        Ability(name="not", recursive_read_only=False, user_namespaces=True),
    ]
    for asked, name in ((config, ""), (config, "able"), (plain, "not")):
        abilities.check_handler(asked, name, others)
    with pytest.raises(UnknownError, match=r"^RROUnsupported: mount /m .*handler not does not"):
        abilities.check_handler(config, "not", others)
