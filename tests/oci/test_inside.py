"""What a bundle's process finds itself to be, in Tare's container and in those of other runtimes: the same assertions for all."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tare.handlers.capabilities import CAPABILITY_BITS
from tests.support.oci import V2, Bundle, Runtime, wait_for

pytestmark = pytest.mark.root

CAPABILITIES = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_MKNOD"]


def status(text: str) -> dict[str, str]:
    """/proc/PID/status, or anything of lines `key: value`."""
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def mounts(text: str) -> dict[str, tuple[set[str], str, set[str]]]:
    """mountinfo: mount point → (mount options, type, super options), of several the last."""
    found = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(), right.split()
        found[fields[4]] = (set(fields[5].split(",")), kind, set(options.split(",")))
    return found


def mask(*names: str) -> int:
    """A capability mask."""
    return sum(CAPABILITY_BITS[name] for name in names)


def test_identity_and_rights(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process["user"] = {"uid": 1000, "gid": 2000, "additionalGids": [5, 3000], "umask": 0o027}
    sets = ("bounding", "effective", "permitted", "inheritable", "ambient")
    bundle.process["capabilities"] = dict.fromkeys(sets, CAPABILITIES)
    bundle.process["oomScoreAdj"] = 321
    found = status(bundle.output(runtime, "cat /proc/self/status; echo Score: $(cat /proc/self/oom_score_adj)"))
    assert found["Uid"].split() == ["1000"] * 4
    assert found["Gid"].split() == ["2000"] * 4
    assert sorted(found["Groups"].split()) == ["3000", "5"]
    assert found["Umask"] == "0027"
    assert found["NoNewPrivs"] == "1"
    assert found["Score"] == "321"
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(found[kind], 16) == mask(*CAPABILITIES), kind
    for kind in ("SigIgn", "SigBlk", "SigPnd"):
        assert int(found[kind], 16) == 0, kind


def test_without_capabilities_there_are_none(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process["capabilities"] = {}
    bundle.process["noNewPrivileges"] = False
    found = status(bundle.output(runtime, "cat /proc/self/status"))
    assert found["NoNewPrivs"] == "0"
    assert all(int(found[kind], 16) == 0 for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"))


def test_a_capability_that_nobody_knows_is_left_out(runtime: Runtime, bundle: Bundle) -> None:
    """Such a value must be warned of, and should be no failure, says the specification (config.md, "capabilities")."""
    bundle.process["capabilities"] = {
        kind: ["CAP_KILL", "CAP_TO_COME"] for kind in ("bounding", "effective", "permitted")
    }
    bundle.write("cat", "/proc/self/status")
    log = bundle.path / "log"
    done = runtime.call("--log", str(log), "run", "--bundle", str(bundle.path), runtime.name_one())
    assert int(status(done.stdout)["CapEff"], 16) == mask("CAP_KILL")
    if runtime.name != "crun":  # which keeps silent
        assert "CAP_TO_COME" in log.read_text()


def test_new_namespaces_are_not_the_nodes(runtime: Runtime, bundle: Bundle) -> None:
    names = ("pid", "net", "ipc", "uts", "mnt", "cgroup")
    found = bundle.output(runtime, f"for n in {' '.join(names)}; do readlink /proc/self/ns/$n; done").split()
    assert len(found) == len(names)
    for name, inside in zip(names, found, strict=True):
        assert inside != os.readlink(f"/proc/self/ns/{name}"), name


def test_namespaces_are_joined_by_path(runtime: Runtime, bundle: Bundle) -> None:
    with subprocess.Popen(["unshare", "--net", "--ipc", "--uts", "sleep", "1000"]) as other:
        try:
            place = Path(f"/proc/{other.pid}/ns")
            while os.readlink(place / "uts") == os.readlink("/proc/self/ns/uts"):
                pass
            paths = {"network": "net", "ipc": "ipc", "uts": "uts"}
            bundle.linux["namespaces"] = [{"type": "pid"}, {"type": "mount"}] + [
                {"type": kind, "path": str(place / name)} for kind, name in paths.items()
            ]
            del bundle.config["hostname"]
            found = bundle.output(runtime, f"for n in {' '.join(paths.values())}; do readlink /proc/self/ns/$n; done")
            assert found.split() == [os.readlink(place / name) for name in paths.values()]
        finally:
            other.kill()


def test_a_pid_namespace_is_joined(runtime: Runtime, bundle: Bundle) -> None:
    first = bundle.start(runtime)
    pid = runtime.state(first)["pid"]
    other = json.loads(json.dumps(bundle.config))
    bundle.linux["namespaces"] = [
        {"type": "pid", "path": f"/proc/{pid}/ns/pid"} if item["type"] == "pid" else item
        for item in bundle.linux["namespaces"]
    ]
    script = "readlink /proc/self/ns/pid; echo $$; cat /proc/1/cmdline | tr '\\0' ' '"
    namespace, own, command = bundle.output(runtime, script).splitlines()
    assert namespace == os.readlink(f"/proc/{pid}/ns/pid")
    assert int(own) > 1
    assert command.strip() == "sleep 1000"
    bundle.config = other


@pytest.mark.parametrize("whose", ["joined", "the runtime's"])
def test_a_mount_namespace_of_others(tare: Runtime, bundle: Bundle, whose: str) -> None:
    """A container that names none has the runtime's (config-linux.md, "Namespaces"). Tare mounts nothing in either: decision 20.

    runc runs nothing there without /proc among the mounts, which it leaves on the node.
    """
    with subprocess.Popen(["unshare", "--mount", "sleep", "1000"]) as other:
        try:
            place = f"/proc/{other.pid}/ns/mnt"
            wait_for(lambda: True if os.readlink(place) != os.readlink("/proc/self/ns/mnt") else None)
            named = [{"type": "mount", "path": place}] if whose == "joined" else []
            bundle.linux.update(namespaces=[{"type": "pid"}, {"type": "uts"}, *named], maskedPaths=[], readonlyPaths=[])
            bundle.config.update(mounts=[], root={"path": "rootfs", "readonly": False})
            name = bundle.start(tare)
            pid = tare.state(name)["pid"]
            assert os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink(place if named else "/proc/self/ns/mnt")
            (bundle.rootfs / "mark").touch()
            assert "mark" in tare.call("exec", name, "ls", "/").stdout.split()
            assert str(bundle.path) not in Path("/proc/self/mountinfo").read_text()
            bundle.config["mounts"] = [{"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}]
            bundle.write()
            refused = tare.call("create", "--bundle", str(bundle.path), tare.name_one(), check=False)
            assert refused.returncode == 1 and "read mounts" in refused.stderr
        finally:
            other.kill()


def test_host_and_domain_name(runtime: Runtime, bundle: Bundle) -> None:
    bundle.config["hostname"] = "inside"
    assert bundle.output(runtime, "hostname") == "inside"


def test_mounts_and_their_options(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("from the node")
    bundle.config["mounts"] += [
        {"destination": "/data", "type": "bind", "source": str(source), "options": ["rbind", "ro", "nosuid"]},
        {"destination": "/etc/a/file", "source": str(source / "file"), "options": ["bind", "noexec", "nodev"]},
        {"destination": "/small", "type": "tmpfs", "source": "tmpfs", "options": ["noatime", "size=64k", "mode=700"]},
    ]
    bundle.config["root"]["readonly"] = False
    found = mounts(bundle.output(runtime, "cat /proc/self/mountinfo"))
    assert {"ro", "nosuid"} <= found["/data"][0]
    assert {"noexec", "nodev", "rw"} <= found["/etc/a/file"][0]
    options, kind, more = found["/small"]
    assert kind == "tmpfs"
    assert "noatime" in options
    assert {"size=64k", "mode=700"} <= more
    for point, expected in (("/proc", "proc"), ("/dev", "tmpfs"), ("/dev/pts", "devpts"), ("/sys", "sysfs")):
        assert found[point][1] == expected
    assert {"nosuid", "noexec", "nodev"} <= found["/dev/shm"][0]
    assert found["/dev/mqueue"][1] == "mqueue"
    assert "rw" in found["/"][0]
    assert bundle.output(runtime, "cat /data/file; cat /etc/a/file") == "from the nodefrom the node"


def test_mounts_are_made_in_their_order(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """ "MUST mount entries in the listed order": what comes later covers what was there, of whatever kind the two are."""
    for name in ("first", "second"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / name).touch()
    tmpfs = {"type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}
    binds = [{"type": "bind", "source": str(tmp_path / name), "options": ["bind"]} for name in ("first", "second")]
    bundle.config["root"]["readonly"] = False
    bundle.config["mounts"] += [
        {"destination": "/one", **tmpfs},
        {"destination": "/one", **binds[0]},
        {"destination": "/one/deep", **tmpfs},
        {"destination": "/two", **binds[0]},
        {"destination": "/two/deep", **tmpfs},
        {"destination": "/two", **binds[1]},
    ]
    script = (
        "ls /one /one/deep /two /two/deep; grep -c ' /one' /proc/self/mountinfo; grep -c ' /two' /proc/self/mountinfo"
    )
    found = bundle.output(runtime, script).split()
    assert found == ["/one:", "deep", "/one/deep:", "/two:", "deep", "/two/deep:", "second", "3", "3"]


def test_a_readonly_root_takes_no_writes(runtime: Runtime, bundle: Bundle) -> None:
    done = bundle.shell(runtime, "echo x >/file", check=False)
    assert done.returncode != 0
    assert "Read-only file system" in done.stderr
    assert not (bundle.rootfs / "file").exists()


def test_masked_and_readonly_paths(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["maskedPaths"] = ["/proc/uptime", "/sys/firmware", "/etc/passwd", "/nowhere"]
    bundle.linux["readonlyPaths"] = ["/proc/sys", "/tmp", "/nowhere"]
    bundle.config["root"]["readonly"] = False
    script = (
        "wc -c </proc/uptime; ls /sys/firmware | wc -l; wc -c </etc/passwd; echo x >/tmp/x; cat /proc/self/mountinfo"
    )
    lines = bundle.shell(runtime, script).stdout.splitlines()
    assert [int(line) for line in lines[:3]] == [0, 0, 0]
    found = mounts("\n".join(lines[3:]))
    assert "ro" in found["/proc/sys"][0]
    assert "ro" in found["/tmp"][0]
    assert not (bundle.rootfs / "tmp/x").exists()


def test_limits(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process["rlimits"] = [
        {"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 4096},
    ]
    found = bundle.output(runtime, "grep -e 'open files' -e 'core file' /proc/self/limits")
    assert [line.split()[3:6] for line in sorted(found.splitlines())] == [
        ["size", "0", "4096"],
        ["77", "99", "files"],
    ]


def test_the_default_devices(runtime: Runtime, bundle: Bundle) -> None:
    names = ("null", "zero", "full", "random", "urandom", "tty")
    found = bundle.output(
        runtime, f"cd /dev; stat -c '%n %t:%T %a %F' {' '.join(names)}; for n in fd stdin ptmx; do readlink $n; done"
    )
    *nodes, fd, stdin, ptmx = found.splitlines()
    assert nodes == [
        f"{name} {numbers} 666 character special file"
        for name, numbers in zip(names, ("1:3", "1:5", "1:7", "1:8", "1:9", "5:0"), strict=True)
    ]
    assert (fd, stdin) == ("/proc/self/fd", "/proc/self/fd/0")
    assert ptmx in ("pts/ptmx", "/dev/pts/ptmx")


def test_devices_asked_for_and_no_others(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["devices"] = [
        {"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 8}
    ]
    bundle.linux["resources"]["devices"] = [{"allow": False, "access": "rwm"}]
    bundle.process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES)
    script = """
        stat -c '%a %u %g' /dev/mine; head -c 3 /dev/zero | wc -c
        mknod /dev/mem c 1 1 && echo made; cat /dev/mem 2>&1 | head -c 200
    """
    lines = bundle.output(runtime, script).splitlines()
    assert lines[:3] == ["640 7 8", "3", "made"]
    assert "Operation not permitted" in lines[3]


def test_kernel_settings_of_its_namespaces(runtime: Runtime, bundle: Bundle) -> None:
    node = Path("/proc/sys/kernel/msgmax").read_text()
    bundle.linux["sysctl"] = {"kernel.msgmax": "12345", "net.ipv4.ip_forward": "1", "net.core.somaxconn": "77"}
    files = "/proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_forward /proc/sys/net/core/somaxconn"
    assert bundle.output(runtime, f"cat {files}").split() == ["12345", "1", "77"]
    assert Path("/proc/sys/kernel/msgmax").read_text() == node


def seccomp(*names: str, **more: Any) -> dict[str, Any]:
    """A profile that allows everything but these calls."""
    entry = {"names": list(names), "action": "SCMP_ACT_ERRNO", **more}
    architectures = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"]
    return {"defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures, "syscalls": [entry]}


def test_a_filter_answers_with_its_errno(runtime: Runtime, bundle: Bundle) -> None:
    bundle.config["root"]["readonly"] = False
    for privileges in (True, False):
        bundle.process["noNewPrivileges"] = privileges
        bundle.linux["seccomp"] = seccomp("mkdir", "mkdirat", errnoRet=28)
        done = bundle.shell(runtime, "grep Seccomp: /proc/self/status; mkdir /made; ls -d /made", check=False)
        assert done.stdout.split() == ["Seccomp:", "2"]
        assert "No space left on device" in done.stderr


def test_control_group_and_limits(runtime: Runtime, bundle: Bundle) -> None:
    path = f"/{runtime.name_one()}"
    bundle.linux["cgroupsPath"] = path
    bundle.linux["resources"] |= {
        "pids": {"limit": 33},
        "memory": {"limit": 64 << 20},
        "cpu": {"shares": 512, "quota": 50000, "period": 100000},
    }
    name = bundle.start(runtime)
    groups = Path(f"/proc/{runtime.state(name)['pid']}/cgroup").read_text()
    assert f"pids:{path}\n" in groups or f"0::{path}\n" in groups
    top = Path("/sys/fs/cgroup")
    if V2:
        files = {"pids.max": "33", "memory.max": str(64 << 20), "cpu.max": "50000 100000"}
        found = {file: (top / path[1:] / file).read_text().strip() for file in files}
    else:
        files = {
            "pids/pids.max": "33",
            "memory/memory.limit_in_bytes": str(64 << 20),
            "cpu/cpu.shares": "512",
            "cpu/cpu.cfs_quota_us": "50000",
        }
        found = {file: (top / file.split("/")[0] / path[1:] / file.split("/")[1]).read_text().strip() for file in files}
    assert found == files


def test_the_group_is_shown_as_the_root_of_its_own_namespace(runtime: Runtime, bundle: Bundle) -> None:
    found = bundle.output(runtime, "cat /proc/self/cgroup; ls /sys/fs/cgroup; cat /proc/self/mountinfo")
    lines = [line for line in found.splitlines() if line.count(":") == 2 and line[:1].isdecimal()]
    assert lines
    used = {"pids", "memory", "cpu", "devices", "freezer", "blkio"}
    assert all(line.endswith(":/") for line in lines if set(line.split(":")[1].split(",")) & used or V2)
    shown = mounts("\n".join(line for line in found.splitlines() if " - " in line))
    assert all("ro" in options for point, (options, _, _) in shown.items() if point.startswith("/sys/fs/cgroup/"))


def test_environment_directory_and_streams(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process["env"] = ["PATH=/bin", "WHAT=ever=so", "EMPTY="]
    bundle.process["cwd"] = "/not/there/yet"
    bundle.config["root"]["readonly"] = False
    bundle.write("sh", "-c", "pwd; env | sort; cat; echo to stderr >&2; exit 9")
    name = runtime.name_one()
    done = runtime.call("run", "--bundle", str(bundle.path), name, stdin="from outside", check=False)
    lines = done.stdout.splitlines()
    assert lines[0] == "/not/there/yet"
    assert {"PATH=/bin", "WHAT=ever=so", "EMPTY="} <= set(lines)
    assert lines[-1] == "from outside"
    assert "to stderr\n" in done.stderr
    assert done.returncode == 9


def test_descriptors_are_inherited_as_asked(runtime: Runtime, bundle: Bundle) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"through")
    os.close(writing)
    bundle.write("sh", "-c", "cat <&3; ls /proc/self/fd | wc -l")

    def third() -> None:
        os.dup2(reading, 3)

    words = ("run", "--bundle", str(bundle.path), "--preserve-fds", "1", runtime.name_one())
    done = runtime.call(*words, close_fds=False, preexec_fn=third)
    os.close(reading)
    assert done.stdout.splitlines()[0] == "through5"  # 0, 1, 2, 3 and the directory itself
    done = bundle.shell(runtime, "ls /proc/self/fd | wc -l")
    assert done.stdout.strip() == "4"


@pytest.mark.parametrize(("wanted", "shown"), [("private", False), ("rslave", True), ("rshared", True)])
def test_propagation_of_the_root(runtime: Runtime, bundle: Bundle, wanted: str, shown: bool) -> None:
    bundle.linux["rootfsPropagation"] = wanted
    line = bundle.output(runtime, "grep ' / / ' /proc/self/mountinfo || grep ' / ' /proc/self/mountinfo | head -1")
    tags = line.partition(" - ")[0].split()[6:]
    if (
        wanted == "rshared" and runtime.name != "runc"
    ):  # runc 1.1 makes it private again; the specification: it is shared
        assert any(tag.startswith("shared:") for tag in tags)
    if not shown:
        assert not tags


def test_a_user_namespace_with_its_mappings(runtime: Runtime, bundle: Bundle) -> None:
    for place in (bundle.path, *bundle.path.parents[:-2]):
        os.chmod(place, 0o755)  # runc mounts in the user namespace, where root is somebody else on the way there
    bundle.linux["namespaces"].append({"type": "user"})
    for kind in ("uidMappings", "gidMappings"):
        bundle.linux[kind] = [{"containerID": 0, "hostID": 200000, "size": 65536}]
    bundle.config["mounts"] = [item for item in bundle.config["mounts"] if item["destination"] != "/sys/fs/cgroup"]
    name = bundle.start(runtime)
    pid = runtime.state(name)["pid"]
    assert Path(f"/proc/{pid}/uid_map").read_text().split() == ["0", "200000", "65536"]
    assert status(Path(f"/proc/{pid}/status").read_text())["Uid"].split() == ["200000"] * 4
    assert runtime.call("exec", name, "id", "-u").stdout.strip() == "0"
    assert os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user")
