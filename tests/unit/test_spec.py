"""A container's OCI configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InternalError, InvalidArgument
from tare.images.records import ImageConfig
from tare.runtime.records import (
    Capabilities,
    ContainerConfig,
    ContainerMetadata,
    ContainerSecurity,
    Device,
    HugepageLimit,
    ImageRef,
    Mount,
    NamespaceMode,
    NamespaceOptions,
    PodConfig,
    PodMetadata,
    PodSecurity,
    Propagation,
    Resources,
    User,
)
from tare.runtime.spec import DeviceNode, PodSurroundings, Spec, container_spec, exec_process
from tare.runtime.spec_process import ALL_CAPABILITIES, DEFAULT_CAPABILITIES, DEFAULT_PATH

POD = PodConfig(metadata=PodMetadata(name="p", uid="u", namespace="n"))
DIRECTORY = Path("/run/tare/pods/p")
PINS = {kind: DIRECTORY / kind for kind in ("net", "ipc", "uts", "pid")}
IMAGE = ImageConfig(
    env=("PATH=/bin", "A=image", "B=image"), entrypoint=("/entry", "-e"), cmd=("cmd",), working_dir="/srv"
)
CONTAINER = ContainerConfig(metadata=ContainerMetadata(name="c"), image=ImageRef(image="i"))


def build(
    container: ContainerConfig = CONTAINER,
    *,
    image: ImageConfig = IMAGE,
    pod: PodConfig = POD,
    pins: dict[str, Path] = PINS,
    hostname: str = "web",
    **other: Any,
) -> Spec:
    surroundings = PodSurroundings(pins=pins, directory=DIRECTORY, hostname=hostname)
    user = other.pop("user", User(uid=5, gid=6, groups=(6, 7)))
    return container_spec(
        pod=pod,
        surroundings=surroundings,
        container=container,
        image=image,
        user=user,
        home="/home/u",
        cgroup_path="/pod/c",
        rootfs=Path("/run/tare/rootfs"),
        **other,
    )


def secured(**security: Any) -> ContainerConfig:
    return replace(CONTAINER, security=ContainerSecurity(**security))


def mounted(*mounts: Mount, **other: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = build(replace(CONTAINER, mounts=mounts, **other))["mounts"]
    return found


def test_the_whole_is_json_and_says_where_it_is() -> None:
    spec = build(annotations={"a": "b"})
    assert json.loads(json.dumps(spec)) == spec
    assert spec["ociVersion"] == "1.2.0"
    assert spec["root"] == {"path": "/run/tare/rootfs", "readonly": False}
    assert spec["linux"]["cgroupsPath"] == "/pod/c"
    assert spec["annotations"] == {"a": "b"}
    assert spec["process"]["user"] == {"uid": 5, "gid": 6, "umask": 18, "additionalGids": [6, 7]}


@pytest.mark.parametrize(
    ("command", "args", "words"),
    [
        ((), (), ["/entry", "-e", "cmd"]),
        ((), ("x",), ["/entry", "-e", "x"]),
        (("sh",), (), ["sh"]),
        (("sh", "-c"), ("x",), ["sh", "-c", "x"]),
    ],
)
def test_command_and_args_replace_the_images(command: tuple[str, ...], args: tuple[str, ...], words: list[str]) -> None:
    assert build(replace(CONTAINER, command=command, args=args))["process"]["args"] == words


@pytest.mark.parametrize("image", [ImageConfig(), ImageConfig(cmd=("",))])
def test_nothing_to_run(image: ImageConfig) -> None:
    with pytest.raises(InvalidArgument, match="no command"):
        build(image=image)


def test_environment() -> None:
    container = replace(CONTAINER, tty=True, envs=(("B", b"request"), ("C", b"\xff"), ("HOME", b"/h")))
    assert build(container)["process"]["env"] == [
        "PATH=/bin",
        "A=image",
        "B=request",
        "HOSTNAME=web",
        "TERM=xterm",
        "C=\udcff",
        "HOME=/h",
    ]
    bare = build(image=ImageConfig(cmd=("x",), env=("EMPTY", "=x", "D=")), hostname="")
    assert bare["process"]["env"] == [f"PATH={DEFAULT_PATH}", "D=", "HOME=/home/u"]


@pytest.mark.parametrize("envs", [(("", b"x"),), (("A=B", b"x"),), (("A", b"x\0y"),)])
def test_environment_that_is_refused(envs: tuple[tuple[str, bytes], ...]) -> None:
    with pytest.raises(InvalidArgument):
        build(replace(CONTAINER, envs=envs))


@pytest.mark.parametrize(
    ("request_directory", "image_directory", "cwd"),
    [("", "", "/"), ("", "srv/../x", "/x"), ("/a/", "/b", "/a"), ("//", "", "/"), ("/../..", "", "/")],
)
def test_working_directory(request_directory: str, image_directory: str, cwd: str) -> None:
    image = replace(IMAGE, working_dir=image_directory)
    assert build(replace(CONTAINER, working_dir=request_directory), image=image)["process"]["cwd"] == cwd


@pytest.mark.parametrize(
    ("wanted", "bounding", "ambient"),
    [
        (Capabilities(), set(DEFAULT_CAPABILITIES), set()),
        (Capabilities(drop=("ALL",)), set(), set()),
        (Capabilities(add=("ALL",)), set(ALL_CAPABILITIES), set()),
        (Capabilities(add=("all",), drop=("cap_net_raw",)), set(ALL_CAPABILITIES) - {"CAP_NET_RAW"}, set()),
        (Capabilities(add=("net_bind_service",), drop=("ALL",)), {"CAP_NET_BIND_SERVICE"}, set()),
        (Capabilities(add=("ALL",), drop=("ALL",)), set(), set()),
        (Capabilities(add=("KILL",), drop=("KILL", "ALL")), set(), set()),
        (Capabilities(drop=("ALL",), add_ambient=("SYS_TIME",)), {"CAP_SYS_TIME"}, {"CAP_SYS_TIME"}),
    ],
)
def test_capabilities(wanted: Capabilities, bounding: set[str], ambient: set[str]) -> None:
    found = build(secured(capabilities=wanted))["process"]["capabilities"]
    for kind in ("bounding", "effective", "permitted"):
        assert set(found[kind]) == bounding
    for kind in ("inheritable", "ambient"):
        assert set(found[kind]) == ambient


def test_an_unknown_capability_is_named() -> None:
    with pytest.raises(InvalidArgument, match="no capability 'NET_BIN'"):
        build(secured(capabilities=Capabilities(add=("NET_BIN",))))


def test_default_mounts_in_order() -> None:
    found = mounted()
    assert [mount["destination"] for mount in found] == [
        "/proc",
        "/dev",
        "/dev/pts",
        "/dev/mqueue",
        "/sys",
        "/sys/fs/cgroup",
        "/dev/shm",
        "/etc/hosts",
        "/etc/hostname",
        "/etc/resolv.conf",
    ]
    by_name = {mount["destination"]: mount for mount in found}
    assert "ro" in by_name["/sys"]["options"] and "ro" in by_name["/sys/fs/cgroup"]["options"]
    assert by_name["/dev/shm"]["source"] == f"{DIRECTORY}/shm"
    assert by_name["/etc/hosts"] == {
        "destination": "/etc/hosts",
        "type": "bind",
        "source": f"{DIRECTORY}/hosts",
        "options": ["rbind", "rprivate", "rw"],
    }


def test_parents_are_mounted_before_what_lies_in_them() -> None:
    paths = ("/data/a/b", "/data", "/etc", "/data/a")
    found = [mount["destination"] for mount in mounted(*(Mount(container_path=path, host_path="/x") for path in paths))]
    assert found[7:] == ["/data", "/etc", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/data/a", "/data/a/b"]


def test_a_mount_replaces_the_default_at_its_path() -> None:
    found = mounted(
        Mount(container_path="/etc/hosts/", host_path="/var/lib/kubelet/hosts"),
        Mount(container_path="/dev/shm", host_path="/x", readonly=True),
        Mount(container_path="/sys/fs/cgroup", host_path="/sys/fs/cgroup"),
    )
    sources = [
        mount["source"] for mount in found if mount["destination"] in ("/etc/hosts", "/dev/shm", "/sys/fs/cgroup")
    ]
    assert sorted(sources) == ["/sys/fs/cgroup", "/var/lib/kubelet/hosts", "/x"]


def test_a_mount_on_dev_hides_all_defaults_in_it() -> None:
    found = [mount["destination"] for mount in mounted(Mount(container_path="/dev", host_path="/dev"))]
    assert [path for path in found if path.startswith("/dev")] == ["/dev"]


@pytest.mark.parametrize(
    ("mount", "options", "root"),
    [
        ({}, ["rbind", "rprivate", "rw"], None),
        ({"readonly": True}, ["rbind", "rprivate", "ro"], None),
        ({"readonly": True, "recursive_read_only": True}, ["rbind", "rprivate", "ro", "rro"], None),
        ({"propagation": Propagation.HOST_TO_CONTAINER}, ["rbind", "rslave", "rw"], "rslave"),
        ({"propagation": Propagation.BIDIRECTIONAL}, ["rbind", "rshared", "rw"], "rshared"),
        ({"options": ("noexec", "rnosuid")}, ["rbind", "rprivate", "rw", "noexec", "rnosuid"], None),
    ],
)
def test_mount_options(mount: dict[str, Any], options: list[str], root: str | None) -> None:
    spec = build(replace(CONTAINER, mounts=(Mount(container_path="/m", host_path="/h", **mount),)))
    assert next(item for item in spec["mounts"] if item["destination"] == "/m")["options"] == options
    assert spec["linux"].get("rootfsPropagation") == root


@pytest.mark.parametrize(
    "mount",
    [
        Mount(container_path="", host_path="/h"),
        Mount(container_path="m", host_path="/h"),
        Mount(container_path="/", host_path="/h"),
        Mount(container_path="/a/..", host_path="/h"),
        Mount(container_path="/m", host_path=""),
        Mount(container_path="/m", host_path="h"),
        Mount(container_path="/m\0", host_path="/h"),
        Mount(container_path="/m", host_path="/h", recursive_read_only=True),
        Mount(
            container_path="/m",
            host_path="/h",
            readonly=True,
            recursive_read_only=True,
            propagation=Propagation.HOST_TO_CONTAINER,
        ),
        Mount(container_path="/m", host_path="/h", options=("size=1",)),
        Mount(container_path="/m", host_path="/h", options=("rshared",)),
        Mount(container_path="/m", image=ImageRef(image="i")),
    ],
)
def test_mounts_that_are_refused(mount: Mount) -> None:
    with pytest.raises(InvalidArgument, match="mount '"):
        mounted(mount)


def test_readonly_root() -> None:
    spec = build(secured(readonly_rootfs=True))
    assert spec["root"]["readonly"] is True
    hosts = next(mount for mount in spec["mounts"] if mount["destination"] == "/etc/hosts")
    assert "ro" in hosts["options"]


def test_privileged() -> None:
    devices = (DeviceNode(path="/dev/kvm", kind="c", major=10, minor=232),)
    security = {"privileged": True, "masked_paths": ("/proc/kcore",), "readonly_paths": ("/proc/sys",)}
    pod = replace(POD, security=PodSecurity(privileged=True))
    spec = build(secured(**security), pod=pod, devices=devices, seccomp={"defaultAction": "SCMP_ACT_ERRNO"})
    linux = spec["linux"]
    assert set(spec["process"]["capabilities"]["bounding"]) == set(ALL_CAPABILITIES)
    assert (linux["maskedPaths"], linux["readonlyPaths"], "seccomp" in linux) == ([], [], False)
    assert linux["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert linux["devices"][0]["path"] == "/dev/kvm"
    assert {"type": "cgroup"} not in linux["namespaces"]
    by_name = {mount["destination"]: mount["options"] for mount in spec["mounts"]}
    assert "rw" in by_name["/sys"] and "rw" in by_name["/sys/fs/cgroup"]


def test_masked_and_readonly_paths_are_the_requests() -> None:
    linux = build(secured(masked_paths=("/proc/kcore",), readonly_paths=("/proc/sys",)))["linux"]
    assert (linux["maskedPaths"], linux["readonlyPaths"]) == (["/proc/kcore"], ["/proc/sys"])
    assert build()["linux"]["maskedPaths"] == []


def kinds(spec: Spec) -> dict[str, str]:
    return {item["type"]: item.get("path", "") for item in spec["linux"]["namespaces"]}


def pod_with(**modes: Any) -> PodConfig:
    return replace(POD, security=PodSecurity(namespaces=NamespaceOptions(**modes)))


def test_namespaces_of_the_pod() -> None:
    assert kinds(build()) == {
        "mount": "",
        "network": f"{DIRECTORY}/net",
        "ipc": f"{DIRECTORY}/ipc",
        "uts": f"{DIRECTORY}/uts",
        "pid": f"{DIRECTORY}/pid",
        "cgroup": "",
    }


def test_namespaces_of_the_node() -> None:
    node = NamespaceMode.NODE
    spec = build(pod=pod_with(network=node, ipc=node, pid=node), pins={})
    assert kinds(spec) == {"mount": "", "cgroup": ""}
    assert next(m for m in spec["mounts"] if m["destination"] == "/dev/shm")["source"] == "/dev/shm"


@pytest.mark.parametrize(
    ("pod_mode", "container_mode", "expected"),
    [
        (NamespaceMode.CONTAINER, None, ""),
        (NamespaceMode.CONTAINER, NamespaceMode.CONTAINER, ""),
        (NamespaceMode.CONTAINER, NamespaceMode.POD, ""),
        (NamespaceMode.POD, NamespaceMode.CONTAINER, ""),
        (NamespaceMode.POD, NamespaceMode.TARGET, "/proc/77/ns/pid"),
        (NamespaceMode.CONTAINER, NamespaceMode.TARGET, "/proc/77/ns/pid"),
        (NamespaceMode.NODE, NamespaceMode.NODE, None),
        (NamespaceMode.NODE, NamespaceMode.POD, None),
        (NamespaceMode.POD, NamespaceMode.POD, f"{DIRECTORY}/pid"),
    ],
)
def test_pid_namespaces(pod_mode: NamespaceMode, container_mode: NamespaceMode | None, expected: str | None) -> None:
    pins = PINS if pod_mode is NamespaceMode.POD else {kind: path for kind, path in PINS.items() if kind != "pid"}
    options = None if container_mode is None else NamespaceOptions(pid=container_mode, target_id="t")
    spec = build(secured(namespaces=options), pod=pod_with(pid=pod_mode), pins=pins, target_pid=77)
    assert kinds(spec).get("pid") == expected


def test_a_target_that_does_not_run() -> None:
    with pytest.raises(InvalidArgument, match="container t does not run"):
        build(secured(namespaces=NamespaceOptions(pid=NamespaceMode.TARGET, target_id="t")))


def test_a_namespace_that_was_not_made_is_our_defect() -> None:
    with pytest.raises(InternalError, match="no net namespace"):
        build(pins={"ipc": DIRECTORY / "ipc"})


def test_resources() -> None:
    wanted = Resources(
        memory_limit=1 << 20,
        cpu_shares=10,
        cpu_quota=-1,
        cpuset_cpus="0",
        hugepage_limits=(HugepageLimit(page_size="2MB", limit=0),),
        unified={"memory.high": "1"},
        oom_score_adj=900,
    )
    spec = build(replace(CONTAINER, resources=wanted))
    found = spec["linux"]["resources"]
    assert found["memory"] == {"limit": 1 << 20, "swap": 1 << 20}
    assert found["cpu"] == {"shares": 10, "quota": -1, "cpus": "0"}
    assert found["hugepageLimits"] == [{"pageSize": "2MB", "limit": 0}]
    assert found["unified"] == {"memory.high": "1"}
    assert spec["process"]["oomScoreAdj"] == 900
    assert set(build()["linux"]["resources"]) == {"devices"}
    more = build(replace(CONTAINER, resources=Resources(memory_limit=8192, memory_swap_limit=-1)))
    assert more["linux"]["resources"]["memory"] == {"limit": 8192, "swap": -1}


def test_device_rules() -> None:
    node = DeviceNode(path="/dev/fuse", kind="c", major=10, minor=229, mode=0o660, gid=5, access="rw")
    linux = build(
        replace(CONTAINER, devices=(Device(container_path="/dev/fuse", host_path="/dev/fuse"),)), devices=(node,)
    )["linux"]
    rules = linux["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}
    assert rules[-1] == {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"}
    assert {"allow": True, "type": "c", "major": 136, "access": "rwm"} in rules
    assert linux["devices"] == [
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o660, "uid": 0, "gid": 5}
    ]


def test_exec() -> None:
    profile = {"defaultAction": "SCMP_ACT_ALLOW"}
    spec = build(secured(no_new_privs=True), seccomp=profile)
    found = exec_process(spec, ["ls", "-l"], tty=True)
    assert (found["args"], found["terminal"], found["seccomp"]) == (["ls", "-l"], True, profile)
    assert found["env"][-1] == "TERM=xterm"
    assert (found["user"], found["cwd"], found["noNewPrivileges"]) == (spec["process"]["user"], "/srv", True)
    assert "seccomp" not in exec_process(build(), ["ls"], tty=False)
    assert spec["process"]["args"] != found["args"]
    for words in ([], [""], ["a\0"]):
        with pytest.raises(InvalidArgument):
            exec_process(spec, words, tty=False)
