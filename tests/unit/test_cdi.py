"""CDI: files read and checked, devices found in directories, and what they change in a container's configuration."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tare.errors import FailedPrecondition, InvalidArgument, NotFound
from tare.runtime.cdi import FILE_LIMIT, Registry, requested
from tare.runtime.cdi_edits import Node, apply, look
from tare.runtime.cdi_spec import Edits, parse
from tare.runtime.records import ContainerConfig, ContainerMetadata, ImageRef

GPU: dict[str, Any] = {
    "cdiVersion": "0.8.0",
    "kind": "vendor.com/gpu",
    "containerEdits": {"env": ["DRIVER=1"], "hooks": [{"hookName": "createContainer", "path": "/bin/ldconfig"}]},
    "devices": [
        {"name": "0", "containerEdits": {"env": ["GPU=0"], "deviceNodes": [{"path": "/dev/null"}]}},
        {"name": "1", "containerEdits": {"env": ["GPU=1"]}},
    ],
}


def changed(**fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(GPU), **fields}


def one(**edits: Any) -> dict[str, Any]:
    """A file with one device that makes these edits."""
    return changed(cdiVersion="1.1.0", containerEdits={}, devices=[{"name": "x", "containerEdits": edits}])


def write(directory: Path, name: str, value: object) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def env(registry: Registry, *names: str) -> list[str]:
    return list(registry.resolve(names).env)


def test_common_edits_once_and_each_devices_own(tmp_path: Path) -> None:
    write(tmp_path / "etc", "gpu.json", GPU)
    registry = Registry([str(tmp_path / "etc"), str(tmp_path / "run")])
    assert env(registry, "vendor.com/gpu=1") == ["DRIVER=1", "GPU=1"]
    edits = registry.resolve(["vendor.com/gpu=1", "vendor.com/gpu=0", "vendor.com/gpu=1"])
    assert edits.env == ("DRIVER=1", "GPU=1", "GPU=0")
    assert len(edits.hooks) == 1
    assert registry.inject({"process": {}}, []) == {"process": {}}


def test_a_nul_byte_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "etc", "gpu.json", one(deviceNodes=[{"path": "/dev/a\0b"}]))
    with pytest.raises(InvalidArgument, match="NUL byte in '/dev/a"):
        parse(str(path), path.read_bytes())


YAML = """
cdiVersion: 0.5.0
kind: vendor.com/net
devices:
- name: nic0
  containerEdits:
    deviceNodes:
    - path: /dev/vfio/9
      hostPath: /dev/null
      fileMode: 0640
      uid: 5
"""


def test_yaml(tmp_path: Path) -> None:
    write(tmp_path, "net.yaml", YAML)
    (node,) = registry_nodes(Registry([str(tmp_path)]), "vendor.com/net=nic0")
    assert node == Node(path="/dev/vfio/9", type="c", major=1, minor=3, mode=0o640, uid=5, gid=None, access="rwm")


def registry_nodes(registry: Registry, name: str) -> tuple[Node, ...]:
    return look(registry.resolve([name]))


def test_later_directories_win_and_two_files_of_one_are_in_conflict(tmp_path: Path) -> None:
    first, second = tmp_path / "etc", tmp_path / "run"
    write(first, "a.json", GPU)
    registry = Registry([str(first), str(second)])
    write(second, "a.json", changed(devices=[{"name": "1", "containerEdits": {"env": ["GPU=other"]}}]))
    assert env(registry, "vendor.com/gpu=1") == ["DRIVER=1", "GPU=other"]
    assert env(registry, "vendor.com/gpu=0") == ["DRIVER=1", "GPU=0"]
    write(first, "b.json", changed(devices=[{"name": "1", "containerEdits": {"env": ["X=1"]}}]))
    assert env(registry, "vendor.com/gpu=1") == ["DRIVER=1", "GPU=other"]
    (second / "a.json").unlink()
    with pytest.raises(FailedPrecondition, match=r"vendor.com/gpu=1: .*/a.json and .*/b.json describe it both"):
        registry.resolve(["vendor.com/gpu=1"])
    assert env(registry, "vendor.com/gpu=0") == ["DRIVER=1", "GPU=0"]
    (first / "b.json").unlink()
    assert env(registry, "vendor.com/gpu=1") == ["DRIVER=1", "GPU=1"]


def test_changes_are_seen_at_the_next_request_and_nothing_is_read_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "a.json", GPU)
    registry = Registry([str(tmp_path)])
    before = registry.known()
    with monkeypatch.context() as patch:
        patch.setattr("tare.runtime.cdi.parse", None)
        assert registry.known() is before
    status = path.stat()
    replacement = write(tmp_path, "a.json.new", json.dumps(GPU).replace("GPU=1", "GPU=2"))
    os.utime(replacement, ns=(status.st_atime_ns, status.st_mtime_ns))
    replacement.rename(path)
    assert env(registry, "vendor.com/gpu=1") == ["DRIVER=1", "GPU=2"]
    path.unlink()
    with pytest.raises(NotFound):
        registry.resolve(["vendor.com/gpu=1"])


def test_a_file_that_is_wrong_costs_its_own_devices_and_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.json", GPU)
    write(tmp_path, "b.json", changed(kind="vendor.com/other", cdiVersion="9.9.9"))
    write(tmp_path, "c.yaml", " " * (FILE_LIMIT + 1))
    write(tmp_path, "ignored.txt", "{")
    (tmp_path / "directory.json").mkdir()
    (tmp_path / "nothing.json").symlink_to(tmp_path / "absent")
    registry = Registry([str(tmp_path), str(tmp_path / "absent")])
    assert env(registry, "vendor.com/gpu=1") == ["DRIVER=1", "GPU=1"]
    assert set(registry.known().problems) == {str(tmp_path / "b.json"), str(tmp_path / "c.yaml")}
    with pytest.raises(
        NotFound, match=r"vendor.com/other=0: no file in .*some files are wrong: .*b.json: .*'9.9.9' is none"
    ):
        registry.resolve(["vendor.com/other=0"])


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    registry = Registry([str(tmp_path / "file")])
    with pytest.raises(NotFound, match="Not a directory"):
        registry.resolve(["vendor.com/gpu=1"])
    assert registry.known() is registry.known()


def config(*names: str, **annotations: str) -> ContainerConfig:
    named = {key.replace("_", "/", 1): value for key, value in annotations.items()}
    return ContainerConfig(
        metadata=ContainerMetadata(name="c"), image=ImageRef(image="x"), cdi_devices=names, annotations=named
    )


def test_what_is_requested() -> None:
    annotations = {"cdi.k8s.io/b": "v.com/c=2,v.com/c=1", "cdi.k8s.io/a": "v.com/c=3", "other": "x"}
    container = ContainerConfig(
        metadata=ContainerMetadata(name="c"),
        image=ImageRef(image="x"),
        cdi_devices=("v.com/c=1",),
        annotations=annotations,
    )
    assert requested(container) == ("v.com/c=1", "v.com/c=3", "v.com/c=2")
    assert requested(config()) == ()


@pytest.mark.parametrize(
    "name", ["", "x", "v.com=1", "v.com/c", "v.com/c=", "/c=1", "v.com/=1", "1v.com/c=1", "v.com/c/d=1", "v.com/c=a b", "v.com/c=-"]
)  # fmt: skip
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="vendor/class=name"):
        requested(config(name))
    with pytest.raises(InvalidArgument, match="vendor/class=name"):
        Registry([str(tmp_path)]).resolve([name])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", "Expecting property name"),
        ("[]", "Expected `object`"),
        ("null", "Expected `object`"),
        ('{"kind": "a.b/c", "kind": "a.b/c"}', "a key is there twice"),
        (changed(cdiVersion="1"), "cdiVersion '1' is none of"),
        (changed(kind="vendor"), "kind 'vendor' is not vendor/class"),
        (changed(kind="v" * 254 + "/gpu"), "is not vendor/class"),
        (changed(devices=[]), "devices is empty"),
        (changed(devices=[{"name": "-"}]), "'-' is no name of a device"),
        (changed(devices=[{"name": "a"}, {"name": "a"}]), "device 'a' is there twice"),
        (changed(surprise=1), "unknown field `surprise`"),
        (
            changed(devices=[{"name": "a", "containerEdits": {"envs": []}}]),
            r"unknown field `envs` - at `\$.devices\[0\]",
        ),
        (
            changed(devices=[{"name": "a", "containerEdits": {"env": [1]}}]),
            r"Expected `str`, got `int` - at `\$.devices",
        ),
        (one(env=["X"]), r"devices\[0\].containerEdits.env\[0\]: 'X' is not NAME=value"),
        (one(env=["=x"]), "is not NAME=value"),
        (changed(containerEdits={"env": ["X"]}), r"^(?!.*devices).*containerEdits.env\[0\]"),
        (one(deviceNodes=[{"path": "dev"}]), "is not absolute"),
        (one(deviceNodes=[{"path": "/dev/x", "type": "x"}]), "type 'x' is none of b, c, u and p"),
        (one(deviceNodes=[{"path": "/dev/x", "permissions": "rx"}]), "permissions 'rx' are not of r, w and m"),
        (one(deviceNodes=[{"path": "/dev/x", "major": -1}]), "major -1 is out of range"),
        (one(mounts=[{"hostPath": "/a", "containerPath": "b"}]), r"mounts\[0\]: it needs"),
        (one(hooks=[{"hookName": "never", "path": "/x"}]), "hookName 'never' is none of"),
        (one(hooks=[{"hookName": "poststop", "path": "x"}]), "path 'x' is not absolute"),
        (one(hooks=[{"hookName": "poststop", "path": "/x", "timeout": 0}]), "timeout 0 is not more than 0"),
        (one(hooks=[{"hookName": "poststop", "path": "/x", "env": ["x"]}]), "env is not NAME=value"),
        (one(additionalGids=[1 << 32]), r"additionalGids\[0\]"),
        (one(intelRdt={"closID": "a/b"}), "intelRdt.closID: 'a/b' is no name"),
        (one(netDevices=[{"hostInterfaceName": "", "name": "x"}]), "netDevices: a name is empty"),
    ],
)
def test_what_is_no_cdi_file(value: object, words: str) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    for path in ("x.json", "x.yaml") if not isinstance(value, str) else ("x.json",):
        with pytest.raises(InvalidArgument, match=words) as caught:
            parse(path, text.encode())
        assert caught.value.doing == f"read CDI file {path}"


@pytest.mark.parametrize(
    ("version", "value"),
    [
        ("1.1.0", one(netDevices=[{"hostInterfaceName": "eth1", "name": "eth1"}])),
        ("1.1.0", one(intelRdt={"enableMonitoring": True})),
        ("0.7.0", one(intelRdt={"closID": "a"})),
        ("0.7.0", one(additionalGids=[5])),
        ("0.6.0", changed(annotations={"a": "b"})),
        ("0.6.0", changed(kind="vendor.com/a.b")),
        ("0.5.0", one(deviceNodes=[{"path": "/a", "hostPath": "/b"}])),
        ("0.5.0", changed(devices=[{"name": "0"}])),
        ("0.4.0", one(mounts=[{"hostPath": "/a", "containerPath": "/b", "type": "none"}])),
    ],
)
def test_a_field_needs_the_version_that_brought_it(version: str, value: dict[str, Any]) -> None:
    assert parse("x.json", json.dumps({**value, "cdiVersion": f"v{version}"}).encode())
    with pytest.raises(InvalidArgument, match=rf"it uses what cdiVersion {version} brought, and says 0.3.0"):
        parse("x.json", json.dumps({**value, "cdiVersion": "0.3.0"}).encode())


def test_null_is_absent() -> None:
    value = changed(annotations=None, devices=[{"name": "a", "containerEdits": {"env": None, "intelRdt": None}}])
    assert parse("x.json", json.dumps(value).encode()).devices[0].container_edits == Edits()


@pytest.mark.parametrize(
    "text", ["a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(8)),
        "a: &a [*a]", "!!python/object/apply:os.system ['true']", "a: 1\na: 2", "? [a]\n: b", "\t"],
)  # fmt: skip
def test_hostile_yaml(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse("x.yaml", text.encode())


SPEC: dict[str, Any] = {
    "process": {"env": ["PATH=/bin", "A=1"], "user": {"uid": 1000, "gid": 0, "additionalGids": [5]}},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": []},
        {"destination": "/data/x", "type": "bind", "source": "/x", "options": ["bind"]},
        {"destination": "/data", "type": "bind", "source": "/y", "options": ["bind"]},
    ],
    "linux": {
        "devices": [{"path": "/dev/a", "type": "c", "major": 1, "minor": 1}],
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    },
}


def edits_of(**edits: Any) -> Edits:
    return parse("x.json", json.dumps(one(**edits)).encode()).devices[0].container_edits


def edited(spec: dict[str, Any], nodes: tuple[Node, ...] = (), **edits: Any) -> dict[str, Any]:
    """The configuration with edits, and that the one given stays as it was."""
    before = copy.deepcopy(spec)
    after = apply(spec, edits_of(**edits), nodes)
    assert spec == before
    return after


def test_variables_and_groups() -> None:
    after = edited(SPEC, env=["A=2", "B=3", "B=4"], additionalGids=[0, 5, 7])
    assert after["process"]["env"] == ["PATH=/bin", "A=2", "B=4"]
    assert after["process"]["user"] == {"uid": 1000, "gid": 0, "additionalGids": [5, 7]}
    assert after["linux"] == SPEC["linux"] and after["mounts"] == SPEC["mounts"]


def test_device_nodes_belong_to_the_containers_user_and_are_allowed() -> None:
    common: dict[str, Any] = {"mode": 0o600, "uid": None, "gid": None}
    nodes = (
        Node(path="/dev/a", type="c", major=195, minor=0, access="rw", **common),
        Node(path="/dev/b", type="b", major=8, minor=1, access="", **common | {"mode": None, "uid": 0, "gid": 9}),
        Node(path="/dev/u", type="u", major=5, minor=1, access="r", **common),
        Node(path="/dev/p", type="p", major=0, minor=0, access="rwm", **common),
    )
    after = edited(SPEC, nodes)
    assert after["linux"]["devices"] == [
        {"path": "/dev/a", "type": "c", "major": 195, "minor": 0, "fileMode": 0o600, "uid": 1000},
        {"path": "/dev/b", "type": "b", "major": 8, "minor": 1, "gid": 9},
        {"path": "/dev/u", "type": "u", "major": 5, "minor": 1, "fileMode": 0o600, "uid": 1000},
        {"path": "/dev/p", "type": "p", "fileMode": 0o600, "uid": 1000},
    ]
    assert after["linux"]["resources"]["devices"] == [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "major": 195, "minor": 0, "access": "rw"},
        {"allow": True, "type": "c", "major": 5, "minor": 1, "access": "r"},
    ]


def test_mounts_replace_those_at_their_path_and_come_after_what_they_lie_in() -> None:
    wanted = [
        {"hostPath": "/lib", "containerPath": "/data/x/", "options": ["ro", "bind"]},
        {"hostPath": "tmpfs", "containerPath": "/t", "type": "tmpfs"},
    ]
    after = edited(SPEC, mounts=wanted)
    assert [(item["destination"], item["source"]) for item in after["mounts"]] == [
        ("/proc", "proc"),
        ("/data", "/y"),
        ("/t", "tmpfs"),
        ("/data/x", "/lib"),
    ]
    assert after["mounts"][-1] == {"destination": "/data/x", "source": "/lib", "options": ["ro", "bind"]}
    mapped = edited({**SPEC, "linux": {"namespaces": [{"type": "user"}]}}, mounts=wanted)
    assert mapped["mounts"][-1]["options"] == ["ro", "bind", "idmap"]
    assert mapped["mounts"][-2]["options"] == []


def test_hooks_and_intel_rdt() -> None:
    hooks = [
        {"hookName": "createContainer", "path": "/a", "args": ["a", "b"], "env": ["X=1"], "timeout": 5},
        {"hookName": "poststop", "path": "/b"},
    ]
    spec = {"hooks": {"poststop": [{"path": "/first"}]}, "linux": {"intelRdt": {"closID": "old"}}}
    after = edited(spec, hooks=hooks, intelRdt={"closID": "new", "l3CacheSchema": "L3:0=f", "enableCMT": True})
    assert after["hooks"] == {
        "poststop": [{"path": "/first"}, {"path": "/b"}],
        "createContainer": [{"path": "/a", "args": ["a", "b"], "env": ["X=1"], "timeout": 5}],
    }
    assert after["linux"]["intelRdt"] == {"closID": "new", "l3CacheSchema": "L3:0=f", "enableCMT": True}
    assert "process" not in after


def test_network_devices_are_refused_and_not_passed_over() -> None:
    with pytest.raises(FailedPrecondition, match=r"netDevices are not supported \(eth1\)"):
        edited(SPEC, netDevices=[{"hostInterfaceName": "eth1", "name": "eth0"}])


def test_looking_at_the_nodes_devices(tmp_path: Path) -> None:
    fifo, plain = tmp_path / "fifo", tmp_path / "plain"
    os.mkfifo(fifo, 0o640)
    plain.write_text("")
    described = {"type": "c", "major": 195, "minor": 7}
    found = look(
        edits_of(
            deviceNodes=[
                {"path": "/dev/zero", "permissions": "r"},
                {"path": "/dev/x", "hostPath": "/dev/full", "type": "u", "permissions": "none"},
                {"path": str(fifo)},
                {"path": "/dev/absent", **described},
                {"path": str(plain), **described, "fileMode": 0o600},
            ]
        )
    )
    assert [(node.path, node.type, node.major, node.minor, node.access) for node in found] == [
        ("/dev/zero", "c", 1, 5, "r"),
        ("/dev/x", "u", 1, 7, ""),
        (str(fifo), "p", 0, 0, "rwm"),
        ("/dev/absent", "c", 195, 7, "rwm"),
        (str(plain), "c", 195, 7, "rwm"),
    ]
    assert [node.mode for node in found][2:] == [0o640, None, 0o600]
    with pytest.raises(NotFound, match="CDI device node /dev/absent: No such file"):
        look(edits_of(deviceNodes=[{"path": "/dev/absent"}]))
    with pytest.raises(FailedPrecondition, match="/dev/null is a device of type c, not one of type b"):
        look(edits_of(deviceNodes=[{"path": "/dev/null", "type": "b"}]))
    with pytest.raises(FailedPrecondition, match="plain is no device"):
        look(edits_of(deviceNodes=[{"path": str(plain)}]))
