"""Pods and containers in memory and on disk: lookups, names, and what is there after a restart or a reboot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tare.errors import AlreadyExists, InternalError, InvalidArgument, NotFound
from tare.runtime.records import (
    ContainerConfig,
    ContainerMetadata,
    ContainerRecord,
    ContainerState,
    ImageRef,
    PodConfig,
    PodMetadata,
    PodRecord,
    PodState,
    ProcessFact,
)
from tare.runtime.store import ContainerFacts, Plan, PodFacts, Store, container_key
from tare.state.database import Database, open_boot


class Disk:
    """The two databases of one node."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.open: list[Database] = []

    def store(self) -> Store:
        state, boot = Database(self.directory / "state.db"), open_boot(self.directory / "boot.db")
        self.open += [state, boot]
        return Store(state, boot)

    def close(self) -> None:
        for database in self.open:
            database.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    yield disk
    disk.close()


def pod(pod_id: str, name: str = "web") -> PodRecord:
    metadata = PodMetadata(name=name, uid="u", namespace="default")
    return PodRecord(id=pod_id, config=PodConfig(metadata=metadata), handler="", state=PodState.READY, created_at=1)


def container(container_id: str, pod_id: str, name: str = "main", created_at: int = 1) -> ContainerRecord:
    config = ContainerConfig(metadata=ContainerMetadata(name=name), image=ImageRef(image="busybox"))
    return ContainerRecord(
        id=container_id,
        pod_id=pod_id,
        config=config,
        image_id="sha256:1",
        image_ref="sha256:1",
        state=ContainerState.CREATED,
        created_at=created_at,
        layers=("sha256:a", "sha256:b"),
    )


PLAN = Plan.of({"process": {"env": ["A=\udc80"]}}, "/pod/c", (Path("/layers/b"), Path("/layers/a")))
FACTS = ContainerFacts(process=ProcessFact(pid=7, start_time=70), cgroup="/pod/c", group="g-0", owns_pid_namespace=True)


def test_unique_prefixes_find(disk: Disk) -> None:
    store = disk.store()
    store.add_pod(pod("abc1", "one"), PodFacts())
    store.add_pod(pod("abd2", "two"), PodFacts())
    assert store.pod("abc", "look at").id == "abc1"
    assert store.pod("abd2", "look at").id == "abd2"
    with pytest.raises(InvalidArgument, match="2 IDs begin with ab"):
        store.pod("ab", "look at")
    with pytest.raises(NotFound, match="look at pod x"):
        store.pod("x", "look at")
    assert store.find_pod("x", "stop") is None
    assert store.find_pod("", "stop") is None


def test_an_id_that_begins_another_is_found_as_itself(disk: Disk) -> None:
    store = disk.store()
    store.add_pod(pod("ab", "one"), PodFacts())
    store.add_pod(pod("abc", "two"), PodFacts())
    assert store.pod("ab", "look at").id == "ab"


def test_names_are_held_until_the_thing_is_gone(disk: Disk) -> None:
    store = disk.store()
    name = pod("1").config.metadata.key
    store.reserve_pod(name, "1")
    with pytest.raises(AlreadyExists, match="held by 1"):
        store.reserve_pod(name, "2")
    store.add_pod(pod("1"), PodFacts())
    store.release_pod(name, "1")
    assert store.holder(name) == "1"
    store.drop_pod("1")
    assert store.holder(name) is None
    store.reserve_pod(name, "2")


def test_a_reservation_is_released_by_its_holder_alone(disk: Disk) -> None:
    store = disk.store()
    store.reserve_pod("name", "1")
    store.release_pod("name", "2")
    assert store.holder("name") == "1"
    store.release_pod("name", "1")
    assert store.holder("name") is None


def test_a_container_that_is_being_made_is_a_member_of_its_pod(disk: Disk) -> None:
    store = disk.store()
    store.add_pod(pod("p"), PodFacts())
    store.reserve_container("name", "c1", "p")
    assert store.members("p") == ["c1"]
    assert store.view(store.pods["p"]).containers == ()
    store.release_container("name", "c1", "p")
    assert store.members("p") == []


def test_everything_is_there_after_a_restart(disk: Disk) -> None:
    before = disk.store()
    before.add_pod(pod("p"), PodFacts(group="g-0", pins={"net": "/x"}))
    before.add_container(container("c2", "p", "second", 2), PLAN)
    before.add_container(container("c1", "p", "first", 1), PLAN)
    before.put_container(replace(before.containers["c1"], state=ContainerState.RUNNING))
    before.put_container_facts("c1", FACTS)
    after = disk.store()
    assert after.pods == before.pods
    assert after.containers == before.containers
    assert after.pod_facts["p"].pins == {"net": "/x"}
    assert after.container_facts == {"c1": FACTS}
    assert after.members("p") == ["c1", "c2"]
    assert after.holder(container_key("p", ContainerMetadata(name="first"))) == "c1"
    assert after.plan("c1") == PLAN
    assert after.plan("c1").spec == {"process": {"env": ["A=\udc80"]}}


def test_a_reboot_leaves_records_and_takes_facts(disk: Disk) -> None:
    before = disk.store()
    before.add_pod(pod("p"), PodFacts(group="g-0"))
    before.add_container(container("c", "p"), PLAN)
    before.put_container_facts("c", FACTS)
    disk.open[1].execute("UPDATE boot SET id = 'another'")
    after = disk.store()
    assert after.pods and after.containers
    assert not (after.pod_facts or after.container_facts)
    assert after.offered() == []


def test_dropping_is_idempotent_and_takes_everything(disk: Disk) -> None:
    store = disk.store()
    store.add_pod(pod("p"), PodFacts())
    store.add_container(container("c", "p"), PLAN)
    store.put_container_facts("c", FACTS)
    for _ in range(2):
        store.drop_container("c")
        store.drop_pod("p")
    assert not (store.pods or store.containers or store.pod_facts or store.container_facts)
    assert store.members("p") == []
    assert store.offered() == []
    with pytest.raises(InternalError, match="plan of container c"):
        store.plan("c")


def test_offers_are_there_until_they_are_claimed(disk: Disk) -> None:
    store = disk.store()
    store.add_pod(pod("p"), PodFacts())
    store.add_container(container("c", "p"), PLAN)
    store.claim("p")
    assert [thing for thing, _ in disk.store().offered()] == ["c"]


def test_layers_are_in_use_from_the_first_look_at_the_image(disk: Disk) -> None:
    store = disk.store()
    assert store.layers() == set()
    store.hold_layers("new", ("sha256:c",))
    store.add_pod(pod("p"), PodFacts())
    store.add_container(container("c", "p"), PLAN)
    assert store.layers() == {"sha256:a", "sha256:b", "sha256:c"}
    store.let_layers_go("new")
    assert store.layers() == {"sha256:a", "sha256:b"}
