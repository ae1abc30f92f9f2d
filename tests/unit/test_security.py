"""What CRI's security context comes to in a container's OCI configuration: user namespaces, confinement, what a pod allows."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tare.errors import FailedPrecondition, InvalidArgument
from tare.handlers.builtin import SourceInfo
from tare.images.records import ImageConfig
from tare.runtime import creating, podfiles, pods
from tare.runtime.abilities import Abilities, RecursiveReadOnlyUnsupported
from tare.runtime.creating import Creation
from tare.runtime.labels import Contexts, Kernel, Labels
from tare.runtime.pods import kinds_of, mappings_of
from tare.runtime.records import (
    ContainerConfig,
    ContainerMetadata,
    ContainerSecurity,
    IdMapping,
    ImageRef,
    Mount,
    NamespaceMode,
    NamespaceOptions,
    PodConfig,
    PodMetadata,
    PodRecord,
    PodSecurity,
    PodState,
    ProfileType,
    SecurityProfile,
    SELinuxOptions,
    User,
    UserNamespace,
)
from tare.runtime.spec import PodSurroundings, Spec, container_spec

DIRECTORY = Path("/run/tare/pods/p")
PINS = {kind: DIRECTORY / kind for kind in ("user", "net", "ipc", "uts", "pid")}
ROOT = User()
IDS = (IdMapping(host_id=100_000, container_id=0, length=65_536),)
GIDS = (IdMapping(host_id=200_000, container_id=0, length=65_536),)
USER = UserNamespace(mode=NamespaceMode.POD, uids=IDS, gids=GIDS)
CONTAINER = ContainerConfig(metadata=ContainerMetadata(name="c"), image=ImageRef(image="i"), command=("true",))
OCI_IDS = {
    "uidMappings": [{"containerID": 0, "hostID": 100_000, "size": 65_536}],
    "gidMappings": [{"containerID": 0, "hostID": 200_000, "size": 65_536}],
}


def pod_with(*, privileged: bool = False, user: UserNamespace | None = USER, **modes: Any) -> PodConfig:
    options = NamespaceOptions(user=user, **modes)
    security = PodSecurity(namespaces=options, privileged=privileged)
    return PodConfig(metadata=PodMetadata(name="p", uid="u", namespace="n"), security=security)


def build(pod: PodConfig, container: ContainerConfig = CONTAINER, user: User = ROOT, **more: Any) -> Spec:
    return container_spec(
        pod=pod,
        surroundings=PodSurroundings(pins=PINS, directory=DIRECTORY, hostname="web"),
        container=container,
        image=ImageConfig(),
        user=user,
        home="/",
        cgroup_path="/pod/c",
        rootfs=Path("/run/tare/rootfs"),
        **more,
    )


def secured(**security: Any) -> ContainerConfig:
    return replace(CONTAINER, security=ContainerSecurity(**security))


def mount_of(spec: Spec, path: str) -> dict[str, Any] | None:
    found: list[dict[str, Any]] = [mount for mount in spec["mounts"] if mount["destination"] == path]
    return found[0] if found else None


def test_a_pods_user_namespace_is_joined_and_its_mappings_are_told() -> None:
    spec = build(pod_with())
    assert {"type": "user", "path": f"{DIRECTORY}/user"} in spec["linux"]["namespaces"]
    assert {key: spec["linux"][key] for key in OCI_IDS} == OCI_IDS
    none = build(pod_with(user=UserNamespace()))
    assert "user" not in {item["type"] for item in none["linux"]["namespaces"]}
    assert "uidMappings" not in none["linux"]


def test_a_pod_with_mappings_makes_a_user_namespace() -> None:
    assert kinds_of(pod_with()) == {"user", "net", "uts", "ipc", "pid"}
    assert kinds_of(pod_with(network=NamespaceMode.NODE, ipc=NamespaceMode.NODE, pid=NamespaceMode.CONTAINER)) == {
        "user"
    }
    mappings = mappings_of(pod_with())
    assert mappings is not None
    assert (mappings.uid, mappings.gid) == (((0, 100_000, 65_536),), ((0, 200_000, 65_536),))
    assert mappings_of(pod_with(user=None)) is mappings_of(pod_with(user=UserNamespace())) is None


def test_sys_is_the_nodes_where_the_user_namespace_does_not_own_the_network() -> None:
    shared = build(pod_with(network=NamespaceMode.NODE))
    assert mount_of(shared, "/sys") == {
        "destination": "/sys",
        "type": "bind",
        "source": "/sys",
        "options": ["rbind", "rprivate", "rnosuid", "rnoexec", "rnodev", "rro"],
    }
    for pod in (pod_with(), pod_with(user=None, network=NamespaceMode.NODE)):
        found = mount_of(build(pod), "/sys")
        assert found is not None and found["type"] == "sysfs"
    order = [mount["destination"] for mount in shared["mounts"]]
    assert order.index("/sys") < order.index("/sys/fs/cgroup")


def test_message_queues_are_shown_where_the_user_namespace_owns_them() -> None:
    assert mount_of(build(pod_with(ipc=NamespaceMode.NODE)), "/dev/mqueue") is None
    assert mount_of(build(pod_with()), "/dev/mqueue") is not None
    assert mount_of(build(pod_with(user=None, ipc=NamespaceMode.NODE)), "/dev/mqueue") is not None


def test_terminals_have_a_group_that_is_mapped() -> None:
    few = UserNamespace(mode=NamespaceMode.POD, uids=IDS, gids=(IdMapping(host_id=9, container_id=0, length=5),))
    for pod, given in ((pod_with(), True), (pod_with(user=few), False), (pod_with(user=None), True)):
        found = mount_of(build(pod), "/dev/pts")
        assert found is not None and ("gid=5" in found["options"]) is given


def test_control_groups_are_the_containers_own_in_a_user_namespace_even_where_it_is_privileged() -> None:
    for user, own in ((USER, True), (None, False)):
        spec = build(pod_with(privileged=True, user=user), secured(privileged=True))
        assert ({"type": "cgroup"} in spec["linux"]["namespaces"]) is own


def test_mapped_volumes_are_mapped_with_all_that_is_in_them() -> None:
    mount = Mount(container_path="/m", host_path="/h", uid_mappings=IDS, gid_mappings=GIDS)
    found = mount_of(build(pod_with(), replace(CONTAINER, mounts=(mount,))), "/m")
    assert found == {
        "destination": "/m",
        "type": "bind",
        "source": "/h",
        "options": ["rbind", "rprivate", "rw", "ridmap"],
        **OCI_IDS,
    }
    plain = mount_of(build(pod_with(), replace(CONTAINER, mounts=(Mount(container_path="/m", host_path="/h"),))), "/m")
    assert plain is not None and "ridmap" not in plain["options"] and "uidMappings" not in plain


def test_images_are_mapped_like_the_root_and_not_otherwise() -> None:
    image = Mount(container_path="/m", image=ImageRef(image="i"), readonly=True)
    for mount in (image, replace(image, uid_mappings=IDS, gid_mappings=GIDS)):
        spec = build(pod_with(), replace(CONTAINER, mounts=(mount,)), volumes={"/m": "lowerdir=/a"})
        found = mount_of(spec, "/m")
        assert found is not None and found["options"] == ["nodev", "ro", "lowerdir=/a"]
    wrong = replace(image, uid_mappings=GIDS, gid_mappings=GIDS)
    for other, pod in ((wrong, pod_with()), (replace(wrong, uid_mappings=IDS), pod_with(user=None))):
        with pytest.raises(InvalidArgument, match="mappings of the pod's user namespace"):
            build(pod, replace(CONTAINER, mounts=(other,)), volumes={"/m": "lowerdir=/a"})


@pytest.mark.parametrize(
    "user", [User(uid=65_536), User(gid=65_536), User(groups=(0, 70_000))], ids=["user", "group", "groups"]
)
def test_an_id_that_is_not_mapped_is_refused(user: User) -> None:
    with pytest.raises(InvalidArgument, match=r"(user|group) \d+ is not mapped in the pod's user namespace"):
        build(pod_with(), user=user)
    assert build(pod_with(user=None), user=user)


@pytest.mark.parametrize(
    ("pod", "container", "agrees"),
    [
        (USER, USER, True),
        (USER, None, True),
        (None, UserNamespace(), True),
        (UserNamespace(), None, True),
        (USER, UserNamespace(), False),
        (None, USER, False),
        (USER, replace(USER, uids=GIDS), False),
    ],
)
def test_a_containers_user_namespace_is_its_pods(
    pod: UserNamespace | None, container: UserNamespace | None, agrees: bool
) -> None:
    config = secured(namespaces=NamespaceOptions(user=container))
    if agrees:
        assert build(pod_with(user=pod), config)
        return
    with pytest.raises(InvalidArgument, match="its user namespace is not its pod's"):
        build(pod_with(user=pod), config)


def test_the_nodes_processes_are_not_for_a_user_namespace() -> None:
    with pytest.raises(InvalidArgument, match="the node's PID namespace"):
        build(pod_with(), secured(namespaces=NamespaceOptions(pid=NamespaceMode.NODE)))


def test_privileges_are_for_pods_that_were_announced_with_them() -> None:
    with pytest.raises(InvalidArgument, match="it is privileged, and its pod is not"):
        build(pod_with(user=None), secured(privileged=True))
    assert build(pod_with(user=None, privileged=True), secured(privileged=True))


def test_profiles_and_labels_are_told() -> None:
    labels = Labels(process="u:r:p:s0:c1", mount="u:r:f:s0:c1")
    spec = build(pod_with(), apparmor="mine", labels=labels)
    assert (spec["process"]["apparmorProfile"], spec["process"]["selinuxLabel"]) == ("mine", labels.process)
    assert spec["linux"]["mountLabel"] == labels.mount
    none = build(pod_with())
    assert not {"apparmorProfile", "selinuxLabel"} & set(none["process"]) and "mountLabel" not in none["linux"]


def test_what_the_kernel_cannot_is_refused_with_its_reason() -> None:
    can = Abilities(user_namespaces="no room", recursive_read_only="too old")
    with pytest.raises(FailedPrecondition, match="run pod p in a user namespace: no room"):
        can.check_pod(pod_with())
    can.check_pod(pod_with(user=UserNamespace()))
    mount = Mount(container_path="/m", host_path="/h", readonly=True, recursive_read_only=True)
    with pytest.raises(RecursiveReadOnlyUnsupported, match=r"^RROUnsupported: .*/m.*too old") as caught:
        can.check_container(replace(CONTAINER, mounts=(mount,)))
    assert caught.value.code == "UNKNOWN"
    can.check_container(replace(CONTAINER, mounts=(replace(mount, recursive_read_only=False),)))
    all_of_it = Abilities(user_namespaces=None, recursive_read_only=None)
    all_of_it.check_pod(pod_with())
    all_of_it.check_container(replace(CONTAINER, mounts=(mount,)))


class Labeller:
    """A handler that notes what it is to label, on a node where SELinux is on and one profile is loaded."""

    def __init__(self, errno: int = 0) -> None:
        self.asked: list[tuple[str, str]] = []
        self.errno = errno

    async def relabel(self, paths: list[tuple[str, str]]) -> list[SourceInfo]:
        self.asked += paths
        return [SourceInfo(path=path, directory=True, errno=self.errno) for path, _ in paths]


def creation_of(config: ContainerConfig, handler: Labeller, node: Kernel, pod: PodConfig) -> Creation:
    """A container that is being made, as far as its confinement is about."""
    record = PodRecord(id="p", config=pod, handler="", state=PodState.READY, created_at=1)
    parts: Any = SimpleNamespace(handler=handler, confinement=lambda: node)
    return creating.begin(parts, "c", record, config, pod)


def confined(config: ContainerConfig, handler: Labeller, node: Kernel, pod: PodConfig | None = None) -> Creation:
    """The creation, once its labels are found and put on its mounts' sources."""

    async def steps() -> Creation:
        creation = creation_of(config, handler, node, pod or pod_with())
        await creating.find_confinement(creation)
        await creating.relabel_sources(creation)
        return creation

    return asyncio.run(steps())


ENFORCING = Kernel(profiles=frozenset({"mine", "tare-default"}), contexts=Contexts())
VOLUME = Mount(container_path="/m", host_path="/srv/volume", selinux_relabel=True)


def test_volumes_get_the_label_of_the_containers_files() -> None:
    handler = Labeller()
    other = Mount(container_path="/n", host_path="/srv/other")
    config = replace(
        CONTAINER, mounts=(VOLUME, other), security=ContainerSecurity(selinux=SELinuxOptions(level="s0:c1,c2"))
    )
    creation = confined(config, handler, ENFORCING)
    assert creation.label.process.endswith(":container_t:s0:c1,c2")
    assert handler.asked == [("/srv/volume", "system_u:object_r:container_file_t:s0:c1,c2")]


def test_a_container_has_its_pods_selinux_options_where_it_has_none() -> None:
    pod = replace(pod_with(), security=PodSecurity(selinux=SELinuxOptions(level="s0:c3,c4")))
    assert confined(CONTAINER, Labeller(), ENFORCING, pod).label.mount.endswith(":s0:c3,c4")
    alone, beside = (confined(CONTAINER, Labeller(), ENFORCING).label for _ in range(2))
    assert alone == beside and alone.process


@pytest.mark.parametrize("privileged", [True, False])
def test_nothing_is_labelled_where_nothing_has_a_label(privileged: bool) -> None:
    handler = Labeller()
    node = ENFORCING if privileged else Kernel()
    config = replace(CONTAINER, mounts=(VOLUME,), security=ContainerSecurity(privileged=privileged))
    assert confined(config, handler, node).label == Labels()
    assert handler.asked == []


def test_directories_of_the_node_are_never_labelled() -> None:
    handler = Labeller()
    for path in ("/", "/etc/", "//etc", "/var/lib/../lib"):
        config = replace(CONTAINER, mounts=(VOLUME, replace(VOLUME, host_path=path)))
        with pytest.raises(InvalidArgument, match="the node itself would not work"):
            confined(config, handler, ENFORCING)
    assert handler.asked == []


def test_a_volume_that_cannot_be_labelled_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="label mount source /srv/volume: Read-only file system"):
        confined(replace(CONTAINER, mounts=(VOLUME,)), Labeller(errno.EROFS), ENFORCING)


@pytest.mark.parametrize(
    ("profile", "name"),
    [
        (None, "tare-default"),
        (SecurityProfile(), "tare-default"),
        (SecurityProfile(type=ProfileType.UNCONFINED), ""),
        (SecurityProfile(type=ProfileType.LOCALHOST, localhost_ref="mine"), "mine"),
    ],
)
def test_apparmor_profiles_where_the_kernel_has_them(profile: SecurityProfile | None, name: str) -> None:
    assert confined(secured(apparmor=profile), Labeller(), ENFORCING).apparmor == name
    wrong = SecurityProfile(type=ProfileType.LOCALHOST, localhost_ref="other")
    with pytest.raises(FailedPrecondition, match="no such profile loaded"):
        confined(secured(apparmor=wrong), Labeller(), ENFORCING)


def test_the_pods_files_are_its_roots_and_have_its_label() -> None:
    assert pods.owner_of("p", pod_with(), Kernel()) == podfiles.Owner(uid=100_000, gid=200_000)
    assert pods.owner_of("p", pod_with(user=None), Kernel()) == podfiles.Owner()
    assert pods.owner_of("p", pod_with(), ENFORCING).label == confined(CONTAINER, Labeller(), ENFORCING).label.mount
