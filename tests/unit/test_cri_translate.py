"""What single fields of requests become, which values are refused and under which name, and what replies show."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tare.cri import translate_replies, translate_requests
from tare.cri.signals import NUMBERS, VALUES
from tare.cri.v1 import api_pb2 as pb
from tare.errors import InvalidArgument
from tare.images.records import ImageConfig, ImageRecord
from tare.runtime.records import (
    ContainerConfig,
    ContainerRecord,
    ContainerState,
    IdMapping,
    NamespaceMode,
    NamespaceOptions,
    PodConfig,
    PodRecord,
    PodState,
    PortMapping,
    ProfileType,
    Resources,
    SecurityProfile,
    SELinuxOptions,
    User,
    UserNamespace,
)

Pod = pb.PodSandboxConfig
Container = pb.ContainerConfig


def pod(change: Callable[[Pod], object] = lambda config: None) -> PodConfig:
    """A pod's configuration as translated, after `change` to the least that is valid."""
    request = pb.RunPodSandboxRequest(config=Pod(metadata=pb.PodSandboxMetadata(name="web")))
    change(request.config)
    return translate_requests.pod_config(request)


def container(change: Callable[[Container], object] = lambda config: None) -> ContainerConfig:
    """A container's configuration as translated, after `change` to the least that is valid."""
    config = Container(metadata=pb.ContainerMetadata(name="app"), image=pb.ImageSpec(image="busybox"))
    change(config)
    return translate_requests.container_config(pb.CreateContainerRequest(config=config))


def security(config: Container) -> pb.LinuxContainerSecurityContext:
    return config.linux.security_context


def sandbox_security(config: Pod) -> pb.LinuxSandboxSecurityContext:
    return config.linux.security_context


def limits(config: Container) -> pb.LinuxContainerResources:
    return config.linux.resources


def mount(config: Container, **fields: object) -> None:
    """A valid mount with other fields over it."""
    values: dict[str, object] = {"container_path": "/data", "host_path": "/srv", **fields}
    config.mounts.append(pb.Mount(**values))  # type: ignore[arg-type]


def test_least_pod_has_defaults() -> None:
    config = pod()
    assert config.metadata.key == "web___0"
    assert config.dns is None
    assert config.security.namespaces == NamespaceOptions()
    assert config.overhead is None


def test_whole_pod() -> None:
    def change(config: Pod) -> None:
        config.hostname = "web-0"
        config.log_directory = "/var/log/pods/web"
        config.dns_config.servers.append("10.0.0.1")
        config.dns_config.options.append("ndots:5")
        config.port_mappings.add(protocol="UDP", container_port=53, host_port=5353, host_ip="::1")
        config.linux.cgroup_parent = "kubepods-burstable.slice"
        config.linux.sysctls["net.ipv4.ip_unprivileged_port_start"] = "0"
        config.linux.overhead.cpu_shares = 10
        context = sandbox_security(config)
        context.namespace_options.pid = pb.CONTAINER
        context.namespace_options.userns_options.uids.add(host_id=65536, container_id=0, length=65536)
        context.namespace_options.userns_options.gids.add(host_id=65536, container_id=0, length=65536)
        context.selinux_options.level = "s0:c1,c2"
        context.run_as_user.value = 0
        context.run_as_group.value = 5

    config = pod(change)
    assert config.port_mappings == (PortMapping(protocol="udp", container_port=53, host_port=5353, host_ip="::1"),)
    assert config.sysctls == {"net.ipv4.ip_unprivileged_port_start": "0"}
    assert config.overhead == Resources(cpu_shares=10)
    mapping = (IdMapping(host_id=65536, container_id=0, length=65536),)
    user = UserNamespace(mode=NamespaceMode.POD, uids=mapping, gids=mapping)
    assert config.security.namespaces == NamespaceOptions(pid=NamespaceMode.CONTAINER, user=user)
    assert config.security.selinux == SELinuxOptions(level="s0:c1,c2")
    assert (config.security.run_as_user, config.security.run_as_group) == (0, 5)


NAMESPACES = "config.linux.security_context.namespace_options"
WHOLE = pb.IDMapping(host_id=65536, length=65536)
NEXT = pb.IDMapping(container_id=65536, host_id=1 << 17, length=65536)


def user_namespace(config: Pod, mode: pb.NamespaceMode, pid: pb.NamespaceMode = pb.POD, **mappings: Any) -> None:
    options = sandbox_security(config).namespace_options
    options.pid = pid
    options.userns_options.CopyFrom(pb.UserNamespace(mode=mode, **mappings))


POD_REFUSALS: list[tuple[str, Callable[[Pod], object]]] = [
    ("config.metadata", lambda c: c.ClearField("metadata")),
    ("config.metadata.name", lambda c: setattr(c.metadata, "name", "")),
    ("config.hostname", lambda c: setattr(c, "hostname", "a" * 65)),
    ("config.hostname", lambda c: setattr(c, "hostname", "a b")),
    ("config.log_directory", lambda c: setattr(c, "log_directory", "logs")),
    ("config.dns_config.servers[0]", lambda c: c.dns_config.servers.append("1.1.1.1\nnameserver 2.2.2.2")),
    ("config.dns_config.searches[0]", lambda c: c.dns_config.searches.append("")),
    ("config.port_mappings[0].protocol", lambda c: c.port_mappings.append(pb.PortMapping(protocol=7))),  # type: ignore[arg-type]
    ("config.port_mappings[0].container_port", lambda c: c.port_mappings.add(container_port=65536)),
    ("config.port_mappings[0].host_port", lambda c: c.port_mappings.add(host_port=-1)),
    ("config.port_mappings[0].host_ip", lambda c: c.port_mappings.add(host_ip="localhost")),
    ("config.linux.cgroup_parent", lambda c: setattr(c.linux, "cgroup_parent", "/kubepods/../../x")),
    ("config.linux.sysctls", lambda c: c.linux.sysctls.update({"../../etc/passwd": "x"})),
    ("config.linux.sysctls", lambda c: c.linux.sysctls.update({"net//x": "x"})),
    ("config.linux.overhead.cpu_period", lambda c: setattr(c.linux.overhead, "cpu_period", 10)),
    (
        "config.linux.security_context.namespace_options.network",
        lambda c: setattr(sandbox_security(c).namespace_options, "network", 9),
    ),
    (
        "config.linux.security_context.namespace_options.pid",
        lambda c: setattr(sandbox_security(c).namespace_options, "pid", pb.TARGET),
    ),
    (f"{NAMESPACES}.userns_options.uids", lambda c: user_namespace(c, pb.POD)),
    (f"{NAMESPACES}.userns_options.gids", lambda c: user_namespace(c, pb.POD, uids=[WHOLE])),
    (f"{NAMESPACES}.userns_options.uids", lambda c: user_namespace(c, pb.POD, uids=[WHOLE, NEXT], gids=[WHOLE])),
    (f"{NAMESPACES}.userns_options.gids", lambda c: user_namespace(c, pb.POD, uids=[WHOLE], gids=[WHOLE, NEXT])),
    (
        f"{NAMESPACES}.userns_options.uids[0].container_id",
        lambda c: user_namespace(c, pb.POD, uids=[NEXT], gids=[NEXT]),
    ),
    (f"{NAMESPACES}.userns_options", lambda c: user_namespace(c, pb.NODE, uids=[WHOLE], gids=[WHOLE])),
    (f"{NAMESPACES}.userns_options.mode", lambda c: user_namespace(c, pb.CONTAINER)),
    (f"{NAMESPACES}.userns_options.mode", lambda c: user_namespace(c, pb.TARGET)),
    (f"{NAMESPACES}.pid", lambda c: user_namespace(c, pb.POD, pid=pb.NODE, uids=[WHOLE], gids=[WHOLE])),
    ("config.linux.security_context.run_as_group", lambda c: setattr(sandbox_security(c).run_as_group, "value", 1)),
    (
        "config.linux.security_context.supplemental_groups[1]",
        lambda c: sandbox_security(c).supplemental_groups.extend([1, -1]),
    ),
]


@pytest.mark.parametrize(("field", "change"), POD_REFUSALS, ids=[f"{i}-{f}" for i, (f, _) in enumerate(POD_REFUSALS)])
def test_pod_is_refused(field: str, change: Callable[[Pod], object]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        pod(change)
    assert caught.value.doing == f"check {field}"


CONTAINER_REFUSALS: list[tuple[str, Callable[[Container], object]]] = [
    ("config.metadata", lambda c: c.ClearField("metadata")),
    ("config.metadata.name", lambda c: setattr(c.metadata, "name", "")),
    ("config.image", lambda c: c.ClearField("image")),
    ("config.image.image", lambda c: setattr(c.image, "image", "")),
    ("config.command[1]", lambda c: c.command.extend(["sh", "a\0b"])),
    ("config.working_dir", lambda c: setattr(c, "working_dir", "srv")),
    ("config.envs[0].key", lambda c: c.envs.add(key="A=B", value=b"x")),
    ("config.envs[0].value", lambda c: c.envs.add(key="A", value=b"\0")),
    ("config.log_path", lambda c: setattr(c, "log_path", "../../etc/cron.d/x")),
    ("config.stop_signal", lambda c: setattr(c, "stop_signal", 66)),
    ("config.mounts[0].container_path", lambda c: mount(c, container_path="data")),
    ("config.mounts[0].container_path", lambda c: mount(c, container_path="//.")),
    ("config.mounts[0].host_path", lambda c: mount(c, host_path="srv")),
    ("config.mounts[0].host_path", lambda c: mount(c, host_path="")),
    ("config.mounts[0].host_path", lambda c: mount(c, image=pb.ImageSpec(image="busybox"))),
    ("config.mounts[0].image_sub_path", lambda c: mount(c, image_sub_path="a/../../b")),
    ("config.mounts[0].propagation", lambda c: mount(c, propagation=3)),
    ("config.mounts[0].recursive_read_only", lambda c: mount(c, recursive_read_only=True)),
    ("config.mounts[0]", lambda c: mount(c, uidMappings=[pb.IDMapping(length=1)])),
    (
        "config.mounts[0].uidMappings[0]",
        lambda c: mount(c, uidMappings=[pb.IDMapping(host_id=1 << 31, length=1 << 31 | 1)]),
    ),
    ("config.mounts[0].mount_options[0]", lambda c: mount(c, mount_options=["a b"])),
    ("config.devices[0].permissions", lambda c: c.devices.add(container_path="/d", host_path="/d", permissions="rx")),
    ("config.devices[0].host_path", lambda c: c.devices.add(container_path="/d", host_path="d")),
    ("config.CDI_devices.name", lambda c: c.CDI_devices.add(name="")),
    ("config.linux.resources.cpu_period", lambda c: setattr(limits(c), "cpu_period", -1)),
    ("config.linux.resources.cpu_quota", lambda c: setattr(limits(c), "cpu_quota", -2)),
    ("config.linux.resources.cpu_quota", lambda c: setattr(limits(c), "cpu_quota", 999)),
    ("config.linux.resources.cpu_quota", lambda c: setattr(limits(c), "cpu_quota", 1 << 62)),
    ("config.linux.resources.cpu_shares", lambda c: setattr(limits(c), "cpu_shares", 1 << 40)),
    ("config.linux.resources.memory_limit_in_bytes", lambda c: setattr(limits(c), "memory_limit_in_bytes", -1)),
    ("config.linux.resources.memory_limit_in_bytes", lambda c: setattr(limits(c), "memory_limit_in_bytes", 1)),
    ("config.linux.resources.oom_score_adj", lambda c: setattr(limits(c), "oom_score_adj", 1001)),
    ("config.linux.resources.cpuset_cpus", lambda c: setattr(limits(c), "cpuset_cpus", "3-1")),
    ("config.linux.resources.cpuset_mems", lambda c: setattr(limits(c), "cpuset_mems", "all")),
    ("config.linux.resources.hugepage_limits[0].page_size", lambda c: limits(c).hugepage_limits.add(page_size="../x")),
    ("config.linux.resources.unified", lambda c: limits(c).unified.update({"../memory.max": "1"})),
    (
        "config.linux.resources.memory_swap_limit_in_bytes",
        lambda c: limits(c).MergeFrom(
            pb.LinuxContainerResources(memory_limit_in_bytes=1 << 20, memory_swap_limit_in_bytes=1 << 19)
        ),
    ),
    (
        "config.linux.security_context.namespace_options.target_id",
        lambda c: setattr(security(c).namespace_options, "pid", pb.TARGET),
    ),
    ("config.linux.security_context.run_as_user", lambda c: setattr(security(c).run_as_user, "value", (1 << 32) - 1)),
    ("config.linux.security_context.run_as_group", lambda c: setattr(security(c).run_as_group, "value", 1)),
    (
        "config.linux.security_context.run_as_username",
        lambda c: security(c).MergeFrom(
            pb.LinuxContainerSecurityContext(run_as_user=pb.Int64Value(value=1), run_as_username="www")
        ),
    ),
    (
        "config.linux.security_context.capabilities.add_capabilities",
        lambda c: security(c).capabilities.add_capabilities.append("NET ADMIN"),
    ),
    ("config.linux.security_context.masked_paths", lambda c: security(c).masked_paths.append("proc/kcore")),
    (
        "config.linux.security_context.seccomp.localhost_ref",
        lambda c: setattr(security(c).seccomp, "profile_type", pb.SecurityProfile.Localhost),
    ),
    (
        "config.linux.security_context.seccomp_profile_path",
        lambda c: setattr(security(c), "seccomp_profile_path", "localhost/relative"),
    ),
    ("config.linux.security_context.apparmor_profile", lambda c: setattr(security(c), "apparmor_profile", "mine")),
]


@pytest.mark.parametrize(
    ("field", "change"), CONTAINER_REFUSALS, ids=[f"{i}-{f}" for i, (f, _) in enumerate(CONTAINER_REFUSALS)]
)
def test_container_is_refused(field: str, change: Callable[[Container], object]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        container(change)
    assert caught.value.doing == f"check {field}"


def test_missing_configurations_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="check config"):
        translate_requests.pod_config(pb.RunPodSandboxRequest())
    with pytest.raises(InvalidArgument, match=r"check config\.metadata"):
        translate_requests.container_config(pb.CreateContainerRequest())


def test_group_goes_with_a_user_by_name() -> None:
    def change(config: Container) -> None:
        security(config).run_as_username = "www"
        security(config).run_as_group.value = 7

    config = container(change)
    assert (config.security.run_as_username, config.security.run_as_group) == ("www", 7)


def test_device_permissions_default_to_all() -> None:
    config = container(lambda c: c.devices.add(container_path="/dev/x", host_path="/dev/null"))
    assert config.devices[0].permissions == "rwm"


@pytest.mark.parametrize(
    ("old", "profile"),
    [
        ("", None),
        ("runtime/default", SecurityProfile()),
        ("docker/default", SecurityProfile()),
        ("unconfined", SecurityProfile(type=ProfileType.UNCONFINED)),
        ("localhost//p.json", SecurityProfile(type=ProfileType.LOCALHOST, localhost_ref="/p.json")),
    ],
)
def test_old_profiles_count_where_the_new_field_is_not_set(old: str, profile: SecurityProfile | None) -> None:
    def change(config: Container) -> None:
        security(config).seccomp_profile_path = old
        security(config).apparmor_profile = old

    config = container(change)
    assert (config.security.seccomp, config.security.apparmor) == (profile, profile)
    assert pod(lambda c: setattr(sandbox_security(c), "seccomp_profile_path", old)).security.seccomp == profile


def test_new_profile_counts_before_the_old_one() -> None:
    def change(config: Container) -> None:
        security(config).seccomp_profile_path = "unconfined"
        security(config).seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
        security(config).apparmor_profile = "unconfined"
        security(config).apparmor.profile_type = pb.SecurityProfile.Localhost
        security(config).apparmor.localhost_ref = "localhost/mine"

    config = container(change)
    assert config.security.seccomp == SecurityProfile()
    assert config.security.apparmor == SecurityProfile(type=ProfileType.LOCALHOST, localhost_ref="mine")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("SIGNAL_SIGTERM", signal.SIGTERM),
        ("SIGNAL_SIGCLD", signal.SIGCHLD),
        ("SIGNAL_SIGIOT", signal.SIGABRT),
        ("SIGNAL_SIGPOLL", signal.SIGIO),
        ("SIGNAL_SIGSTKFLT", 16),
        ("SIGNAL_SIGRTMIN", 34),
        ("SIGNAL_SIGRTMINPLUS15", 49),
        ("SIGNAL_SIGRTMAXMINUS14", 50),
        ("SIGNAL_SIGRTMAX", 64),
    ],
)
def test_signal_numbers(name: str, number: int) -> None:
    assert NUMBERS[pb.Signal.Value(name)] == number


def test_all_signals_have_numbers_and_all_numbers_but_two_have_signals() -> None:
    assert set(NUMBERS) == set(pb.Signal.values()) - {pb.SIGNAL_RUNTIME_DEFAULT}
    assert set(VALUES) == set(range(1, 65)) - {32, 33}
    assert VALUES[signal.SIGCHLD] == pb.SIGNAL_SIGCHLD


def record(config: ContainerConfig) -> ContainerRecord:
    """An exited container."""
    return ContainerRecord(
        id="c1",
        pod_id="p1",
        config=config,
        image_id="sha256:11",
        image_ref="docker.io/library/busybox@sha256:22",
        state=ContainerState.EXITED,
        created_at=1,
        started_at=2,
        finished_at=3,
        exit_code=137,
        reason="OOMKilled",
        log_path="/var/log/pods/web/app/0.log",
        user=User(uid=1000, gid=100, groups=(100, 4)),
        stop_signal=10,
        resources=Resources(memory_limit=1 << 20),
    )


def test_container_status_and_item() -> None:
    config = container(lambda c: mount(c, container_path="/data//", readonly=True))
    status = translate_replies.container_status(record(config))
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 137, "OOMKilled")
    assert (status.created_at, status.started_at, status.finished_at) == (1, 2, 3)
    assert list(status.mounts) == [pb.Mount(container_path="/data//", host_path="/srv", readonly=True)]
    assert status.user.linux == pb.LinuxContainerUser(uid=1000, gid=100, supplemental_groups=[100, 4])
    assert status.stop_signal == pb.SIGNAL_SIGUSR1
    assert status.resources.linux.memory_limit_in_bytes == 1 << 20
    item = translate_replies.container_item(record(config))
    assert (item.image_ref, item.image_id) == (status.image_ref, status.image_id)
    assert (item.id, item.pod_sandbox_id, item.state) == ("c1", "p1", pb.CONTAINER_EXITED)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        (pb.ImageSpec(image="busybox"), "busybox"),
        (pb.ImageSpec(image="busybox", user_specified_image="other"), "busybox"),
        (pb.ImageSpec(image="sha256:11"), "sha256:11"),
        (pb.ImageSpec(image="sha256:11", user_specified_image="busybox:1"), "busybox:1"),
    ],
)
def test_image_is_shown_by_the_name_that_a_person_gave(asked: pb.ImageSpec, shown: str) -> None:
    config = container(lambda c: c.image.CopyFrom(asked))
    assert translate_replies.container_status(record(config)).image.image == shown
    assert translate_replies.container_item(record(config)).image.image == shown


def test_pod_status() -> None:
    config = pod(lambda c: setattr(sandbox_security(c).namespace_options, "pid", pb.NODE))
    made = PodRecord(
        id="p1",
        config=config,
        handler="h",
        state=PodState.NOTREADY,
        created_at=5,
        ips=("10.0.0.2", "fd00::2", "fd00::3"),
    )
    status = translate_replies.pod_status(made)
    assert status.state == pb.SANDBOX_NOTREADY
    assert status.network.ip == "10.0.0.2"
    assert [item.ip for item in status.network.additional_ips] == ["fd00::2", "fd00::3"]
    assert status.linux.namespaces.options == pb.NamespaceOption(pid=pb.NODE)
    assert status.runtime_handler == "h"
    assert translate_replies.pod_item(made).metadata.name == "web"


def test_pod_status_without_addresses_has_a_network_all_the_same() -> None:
    status = translate_replies.pod_status(
        PodRecord(id="p", config=pod(), handler="", state=PodState.READY, created_at=1)
    )
    assert status.HasField("network")
    assert status.network.ip == ""


def image(user: str) -> ImageRecord:
    return ImageRecord(
        id="sha256:11",
        repo_tags=("docker.io/library/busybox:latest",),
        repo_digests=("docker.io/library/busybox@sha256:22",),
        size=1234,
        config=ImageConfig(user=user, env=("A=b",), cmd=("sh",), volumes=("/data",)),
        chain_ids=("sha256:33",),
        pinned=True,
    )


@pytest.mark.parametrize(
    ("user", "uid", "username"),
    [
        ("", None, ""),
        ("1000", 1000, ""),
        ("1000:100", 1000, ""),
        ("0", 0, ""),
        ("www", None, "www"),
        ("www:100", None, "www"),
        ("4294967294", 4294967294, ""),
        ("9" * 5000, None, "9" * 5000),
        ("²", None, "²"),
    ],
)
def test_image_user(user: str, uid: int | None, username: str) -> None:
    reply = translate_replies.image_item(image(user))
    assert (reply.uid.value if reply.HasField("uid") else None) == uid
    assert reply.username == username


def test_image_and_its_info() -> None:
    reply = translate_replies.image_item(image(""))
    assert (reply.id, reply.size, reply.pinned) == ("sha256:11", 1234, True)
    assert list(reply.repo_tags) == ["docker.io/library/busybox:latest"]
    info = json.loads(translate_replies.image_info(image(""))["info"])
    assert info["imageSpec"]["config"] == {"Env": ["A=b"], "Cmd": ["sh"], "Volumes": {"/data": {}}}


def test_registry_auth() -> None:
    assert translate_requests.registry_auth(pb.PullImageRequest()) is None
    only_server = pb.PullImageRequest(auth=pb.AuthConfig(server_address="registry"))
    assert translate_requests.registry_auth(only_server) is None
    given = pb.PullImageRequest(auth=pb.AuthConfig(username="u", password="p", server_address="registry"))
    auth = translate_requests.registry_auth(given)
    assert auth is not None
    assert (auth.username, auth.password, auth.server_address) == ("u", "p", "registry")


def test_commands_and_timeouts() -> None:
    assert translate_requests.command(pb.ExecSyncRequest(cmd=["sh", "-c", ""])) == ("sh", "-c", "")
    assert translate_requests.timeout(0) == 0.0
    for refused in ([], [""]):
        with pytest.raises(InvalidArgument, match="check cmd"):
            translate_requests.command(pb.ExecSyncRequest(cmd=refused))
    with pytest.raises(InvalidArgument, match="check timeout"):
        translate_requests.timeout(-1)
