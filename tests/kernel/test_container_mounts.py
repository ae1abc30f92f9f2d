"""A container's file systems: what is mounted where with which flags, what is hidden, and how bind mounts relate to the node's."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tare.cgroups.layout import detect
from tare.handlers import compile as compiler
from tare.handlers.builtin import Hierarchies, StartFailed
from tare.launch import linux
from tests.support.launch import MASKED, READONLY, Box, Launch, bind, in_launch, line, standard_mounts, until
from tests.support.mounts import MountLine, mount_table, mounted_tmpfs, mounts_below

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
MOUNTER = {kind: ["CAP_SYS_ADMIN"] for kind in ("bounding", "effective", "permitted")}


def table(box: Box) -> dict[str, MountLine]:
    """A container's mounts."""
    return mount_table(Path(f"/proc/{box.process.pid}/mountinfo").read_text())


def root(box: Box) -> Path:
    """A container's root, seen from the node. Symbolic links in it lead nowhere sensible."""
    return Path(f"/proc/{box.process.pid}/root")


def test_the_file_systems_of_a_container(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        found = table(box)
        closed = {"nosuid", "nodev", "noexec"}
        assert found["/"].kind == "overlay" and "rw" in found["/"].flags
        expected = {"/proc": "proc", "/dev": "tmpfs", "/dev/pts": "devpts", "/dev/mqueue": "mqueue", "/sys": "sysfs"}
        for point, kind in expected.items():
            assert found[point].kind == kind, point
        assert closed <= found["/proc"].flags and "rw" in found["/proc"].flags
        assert closed | {"ro"} <= found["/sys"].flags and closed | {"ro"} <= found["/sys/fs/cgroup"].flags
        assert {"nosuid", "rw"} <= found["/dev"].flags and "relatime" not in found["/dev"].flags
        assert "mode=755" in found["/dev"].super_options
        assert {"gid=5", "mode=620", "ptmxmode=666"} <= found["/dev/pts"].super_options
        # Nothing of the node is left: no mount above ours, and nothing that would tell the node of mounts made here.
        assert all(not entry.propagation for entry in found.values())
        assert not mounts_below(launch.run_directory)

    in_launch(tmp_path, body)


def test_controllers_that_share_a_hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /sys/fs/cgroup/cpu,cpuacct on many nodes: programs look for /sys/fs/cgroup/cpu."""
    tree = next((tree for tree in detect().hierarchies if tree.version == 1), None)
    if tree is None:
        return
    setting = tree.options.split(",")
    shared = Hierarchies(v1=((f"{setting[0]},other", tuple(setting)),))
    monkeypatch.setattr(Launch, "hierarchies", lambda _: shared)

    async def body(launch: Launch) -> None:
        script = f"cd /sys/fs/cgroup; readlink {setting[0]}; ls; grep -c . {setting[0]}/cgroup.procs; rm {setting[0]}"
        result = await launch.run(["sh", "-c", script])
        assert result.out.split()[:3] == [f"{setting[0]},other", setting[0], f"{setting[0]},other"]
        assert int(result.out.split()[3]) > 0 and "Read-only" in result.err

    in_launch(tmp_path, body)


def test_devices_and_links(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        device = {
            "path": "/dev/deep/fuse",
            "type": "c",
            "major": 10,
            "minor": 229,
            "fileMode": 0o640,
            "uid": 3,
            "gid": 4,
        }
        box = await launch.start(SLEEP, linux={"devices": [device]})
        numbers = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
        for name, (major, minor) in numbers.items():
            facts = (root(box) / "dev" / name).stat()
            assert stat.S_ISCHR(facts.st_mode) and stat.S_IMODE(facts.st_mode) == 0o666, name
            assert facts.st_rdev == os.makedev(major, minor) and (facts.st_uid, facts.st_gid) == (0, 0)
        facts = (root(box) / "dev/deep/fuse").stat()
        assert facts.st_rdev == os.makedev(10, 229) and stat.S_IMODE(facts.st_mode) == 0o640
        assert (facts.st_uid, facts.st_gid) == (3, 4)
        links = {entry.name: str(entry.readlink()) for entry in (root(box) / "dev").iterdir() if entry.is_symlink()}
        assert links == {
            "fd": "/proc/self/fd",
            "stdin": "/proc/self/fd/0",
            "stdout": "/proc/self/fd/1",
            "stderr": "/proc/self/fd/2",
            "ptmx": "pts/ptmx",
        }
        assert not (root(box) / "dev/console").exists()

    in_launch(tmp_path, body)


def test_masked_paths_show_nothing_and_reach_nothing(tmp_path: Path) -> None:
    """Also their mode: root in a container owns the null device that hides a file (root is root without a user namespace)."""

    async def body(launch: Launch) -> None:
        box = await launch.start(
            SLEEP,
            linux={"maskedPaths": [*MASKED, "/proc/version/below", "/proc/version", "/etc/secret", "/var/secrets"]},
        )
        found = table(box)
        for path in ("/proc/acpi", "/proc/version", "/proc/keys", "/sys/firmware"):
            if (root(box) / path[1:]).exists():
                assert "ro" in found[path].flags and found[path].kind in ("tmpfs", "devtmpfs"), path
        script = "cat /proc/version; ls /sys/firmware; echo x >/proc/version; chmod 0 /proc/version; chown 5 /proc/version; echo $?"
        result = await launch.exec(box, ["sh", "-c", script])
        assert "Read-only file system" in result.out and result.out.endswith("1\n")
        assert stat.S_IMODE(os.stat("/dev/null").st_mode) == 0o666
        assert stat.S_IMODE((root(box) / "dev/null").stat().st_mode) == 0o666

    in_launch(tmp_path, body)


def test_masks_over_a_dev_that_is_the_nodes(tmp_path: Path) -> None:
    """Then there is no null device of our own to bind: the node's, and it cannot be changed through that."""

    async def body(launch: Launch) -> None:
        mounts = [item for item in standard_mounts() if not item["destination"].startswith("/dev")]
        spec = launch.spec(SLEEP) | {"mounts": [*mounts, bind("/dev", "/dev")]}
        identity, overlay, ends = launch.place()
        made = await launch.handler.start(identity, spec, overlay=overlay, cgroup=launch.cgroup(identity))
        launch.processes[made] = None
        box = Box(id=identity, process=made, upper=overlay.upper, cgroup=launch.cgroup(identity), streams=ends)
        result = await launch.exec(box, ["sh", "-c", "chmod 600 /proc/keys; echo $?"])
        assert result.out.endswith("Read-only file system\n1\n")
        assert stat.S_IMODE(os.stat("/dev/null").st_mode) == 0o666

    in_launch(tmp_path, body)


def test_read_only_paths(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        found = table(box)
        for path in READONLY:
            if (root(box) / path[1:]).exists():
                assert "ro" in found[path].flags and {"nosuid", "nodev", "noexec"} <= found[path].flags, path
        result = await launch.exec(
            box,
            [
                "sh",
                "-c",
                "echo 1 >/proc/sys/vm/drop_caches; echo 1 >/proc/fs/x; echo 1 >/proc/irq/default_smp_affinity",
            ],
        )
        assert result.out.count("Read-only file system") == 2

    in_launch(tmp_path, body)


def test_a_read_only_root(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        data = tmp_path / "data"
        data.mkdir()
        script = "touch /x; mkdir /tmp/y; touch /data/z && echo written; touch /dev/shm-like && echo dev"
        result = await launch.run(["sh", "-c", script], root={"readonly": True}, mounts=[bind("/data", data)])
        assert result.err.count("Read-only file system") == 2
        assert result.out == "written\ndev\n" and (data / "z").exists()

    in_launch(tmp_path, body)


def test_layers_are_stacked_top_first(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        layers: list[Path] = []
        for name in ("low", "middle", "top"):
            (tmp_path / name / "etc").mkdir(parents=True)
            (tmp_path / name / "etc/which").write_text(name)
            (tmp_path / name / "etc" / name).write_text("")
            layers.insert(0, tmp_path / name)
        result = await launch.run(["sh", "-c", "cat /etc/which; ls /etc; echo new >/etc/which"], lowers=layers)
        assert result.out == "toplow\nmiddle\ntop\nwhich\n"
        assert (tmp_path / "top/etc/which").read_text() == "top"

    in_launch(tmp_path, body)


def by_mount(patch: pytest.MonkeyPatch) -> None:
    """From now on plans ask for the root file system as on kernels before 6.5."""
    compile_container = compiler.container

    def old(*arguments: Any) -> compiler.Compiled:
        result = compile_container(*arguments)
        for part in {"before", "steps"} & set(result.plan):
            steps = result.plan[part]
            result.plan[part] = [("old_overlay", *step[1:]) if step[0] == "overlay" else step for step in steps]
        return result

    patch.setattr(compiler, "container", old)


@pytest.mark.parametrize("propagation", [linux.MS_PRIVATE, linux.MS_SHARED])
def test_the_root_on_older_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, propagation: int) -> None:
    """mount(2) instead of the newer calls: nothing of it shows on the node, not even where the run directory's mount is shared."""
    by_mount(monkeypatch)
    base = tmp_path / "node"

    async def body(launch: Launch) -> None:
        extra = tmp_path / "a,b:c\\d"
        extra.mkdir()
        (extra / "here").write_text("yes")
        box = await launch.start(["sh", "-c", "cat /here; echo ok >/written; echo done; sleep 1000"], lowers=[extra])
        written = box.upper / "written"
        await until(lambda: written.exists() and written.read_text() == "ok\n", "the write")
        found = table(box)
        assert found["/"].kind == "overlay" and not found["/"].propagation
        lines = Path(f"/proc/{box.process.pid}/mountinfo").read_text().splitlines()
        assert [entry.split()[4] for entry in lines].count("/") == 1
        assert mounts_below(base) == []
        with pytest.raises(StartFailed) as caught:
            await launch.start(SLEEP, lowers=[tmp_path / "missing"])
        assert caught.value.step == "make the root file system" and caught.value.errno == 2

    with mounted_tmpfs(base, propagation):
        in_launch(base, body)


def test_paths_too_long_for_the_newer_calls(tmp_path: Path) -> None:
    """fsconfig(2) takes 255 bytes: then mount(2) does it, on any kernel."""
    base = tmp_path / ("d" * 100) / ("e" * 100)
    base.mkdir(parents=True)
    (tmp_path / "short").symlink_to(base)
    assert len(os.fsencode(base)) > 200

    async def body(launch: Launch) -> None:
        identity, overlay, ends = launch.place()
        far = base / ("f" * 100)
        for name in ("upper", "work"):
            (far / name).mkdir(parents=True)
        overlay = type(overlay)(lowers=overlay.lowers, upper=far / "upper", work=far / "work")
        made = await launch.handler.start(
            identity, launch.spec(["sh", "-c", "echo hi | tee /x"]), overlay=overlay, cgroup=launch.cgroup(identity)
        )
        assert (await launch.wait(made)).code == 0
        assert os.read(ends["stdout"], 10) == b"hi\n" and (far / "upper/x").read_text() == "hi\n"

    in_launch(tmp_path, body)


def test_binds_of_files_and_directories(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        (tmp_path / "file").write_text("from the node\n")
        (tmp_path / "tree/sub").mkdir(parents=True)
        mounts = [
            bind("/etc/motd", tmp_path / "file"),
            bind("/new/place/file", tmp_path / "file", "ro"),
            bind("/new/tree", tmp_path / "tree"),
        ]
        script = "cat /etc/motd /new/place/file; ls /new/tree; echo x >/new/place/file; echo back >/new/tree/sub/f"
        box = await launch.start(["sh", "-c", f"{script}; sleep 1000"], mounts=mounts)
        assert await line(box, count=3) == "from the node\nfrom the node\nsub"
        assert "Read-only" in await line(box, "stderr")
        await until(lambda: (tmp_path / "tree/sub/f").exists(), "the write")
        made = box.upper / "new"
        assert stat.S_IMODE(made.stat().st_mode) == stat.S_IMODE((made / "place").stat().st_mode) == 0o755
        assert (made / "place/file").read_bytes() == b"" and stat.S_IMODE((made / "place/file").stat().st_mode) == 0o644
        assert (root(box) / "new/tree").stat().st_ino == (tmp_path / "tree").stat().st_ino
        assert (root(box) / "etc/motd").stat().st_ino == (tmp_path / "file").stat().st_ino

    in_launch(tmp_path, body)


def test_mount_targets_through_links_of_the_image(tmp_path: Path) -> None:
    """Images have /var/run → /run and /etc/resolv.conf → ../run/…, also where those are not there (yet). All stays beneath the root."""

    async def body(launch: Launch) -> None:
        (tmp_path / "file").write_text("here\n")
        image = tmp_path / "image"
        (image / "var").mkdir(parents=True)
        (image / "etc").mkdir()
        (image / "var/run").symlink_to("/run/now")
        (image / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub.conf")
        (image / "up").symlink_to("../../../../../tmp/up")
        (image / "chain").symlink_to("up/to/")
        mounts = [
            bind("/var/run/secrets/token", tmp_path / "file"),
            bind("/etc/resolv.conf", tmp_path / "file"),
            bind("/chain/there", tmp_path / "file"),
        ]
        script = "cat /run/now/secrets/token /run/systemd/resolve/stub.conf /tmp/up/to/there; ls -l /etc/resolv.conf"
        result = await launch.run(["sh", "-c", script], mounts=mounts, lowers=[image])
        assert result.err == "" and result.out.startswith("here\nhere\nhere\nl")
        assert not Path("/run/now").exists() and not Path("/tmp/up").exists()

    in_launch(tmp_path, body)


def test_links_in_a_circle(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        image = tmp_path / "image"
        image.mkdir()
        (image / "a").symlink_to("b")
        (image / "b").symlink_to("a")
        with pytest.raises(StartFailed, match="symbolic links") as caught:
            await launch.start(SLEEP, lowers=[image], mounts=[bind("/a/x", tmp_path)])
        assert (caught.value.step, caught.value.errno) == ("mount /a/x", 40)

    in_launch(tmp_path, body)


def test_read_only_binds_and_what_is_mounted_below(tmp_path: Path) -> None:
    """ro is for the mount alone, rro for those below it too; a plain bind takes none of those along."""
    with mounted_tmpfs(tmp_path / "tree"), mounted_tmpfs(tmp_path / "tree/sub"):

        async def body(launch: Launch) -> None:
            tree = tmp_path / "tree"
            mounts = [
                bind("/ro", tree, "rprivate", "ro", "noexec", "nosuid", "nodev", "noatime"),
                bind("/rro", tree, "rprivate", "rro"),
                {"destination": "/alone", "type": "bind", "source": str(tree), "options": ["bind", "ro"]},
            ]
            found = table(await launch.start(SLEEP, mounts=mounts))
            assert {"ro", "noexec", "nosuid", "nodev", "noatime"} <= found["/ro"].flags
            assert "rw" in found["/ro/sub"].flags and "noexec" not in found["/ro/sub"].flags
            assert "ro" in found["/rro"].flags and "ro" in found["/rro/sub"].flags
            assert "ro" in found["/alone"].flags and "/alone/sub" not in found
            node = mount_table(Path("/proc/self/mountinfo").read_text())
            assert "rw" in node[str(tree)].flags and "rw" in node[f"{tree}/sub"].flags

        in_launch(tmp_path, body)


async def mounts_inside(launch: Launch, box: Box, point: str) -> None:
    """Mount a tmpfs within a running container."""
    result = await launch.exec(box, ["mount", "-t", "tmpfs", "inner", point], capabilities=MOUNTER)
    assert result.code == 0, result.out


@pytest.mark.parametrize(
    ("option", "to_container", "to_node"),
    [("rprivate", False, False), ("rslave", True, False), ("rshared", True, True)],
)
def test_propagation(tmp_path: Path, option: str, to_container: bool, to_node: bool) -> None:
    with mounted_tmpfs(tmp_path / "shared", linux.MS_SHARED) as shared:

        async def body(launch: Launch) -> None:
            for name in ("before", "after", "inside"):
                (shared / name).mkdir()
            linux.mount(b"tmpfs", bytes(shared / "before"), b"tmpfs")
            try:
                box = await launch.start(SLEEP, mounts=[bind("/data", shared, option)], capabilities=MOUNTER)
                linux.mount(b"tmpfs", bytes(shared / "after"), b"tmpfs")
                (shared / "after/mark").touch()
                await mounts_inside(launch, box, "/data/inside")
                found = table(box)
                assert "/data/before" in found
                assert ("/data/after" in found) is to_container
                assert (root(box) / "data/after/mark").exists() is to_container
                assert (f"{shared}/inside" in mounts_below(tmp_path)) is to_node
                kinds = [entry.partition(":")[0] for entry in found["/data"].propagation]
                assert kinds == {"rprivate": [], "rslave": ["master"], "rshared": ["shared"]}[option]
                await launch.kill(box)
            finally:
                for point in mounts_below(shared):
                    linux.umount(os.fsencode(point), linux.MNT_DETACH)

        in_launch(tmp_path, body)


def test_mounts_of_the_container_do_not_reach_a_shared_node(tmp_path: Path) -> None:
    """The run directory, layers and all lie on a shared mount here, as on a node under systemd."""
    with mounted_tmpfs(tmp_path / "node", linux.MS_SHARED) as base:

        async def body(launch: Launch) -> None:
            before = mounts_below(tmp_path)
            box = await launch.start(SLEEP, mounts=[bind("/data", base)], capabilities=MOUNTER)
            await mounts_inside(launch, box, "/tmp")
            await mounts_inside(launch, box, "/data")
            assert mounts_below(tmp_path) == before

        in_launch(base, body)


def test_root_propagation(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, linux={"rootfsPropagation": "rshared"})
        assert [entry.partition(":")[0] for entry in table(box)["/"].propagation] == ["shared"]

    in_launch(tmp_path, body)


def test_a_mount_that_cannot_be_names_itself(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "dir").mkdir()
        cases: list[tuple[dict[str, Any], int, str]] = [
            (bind("/x", tmp_path / "none"), 2, str(tmp_path / "none")),
            (bind("/etc", tmp_path / "file"), 20, "/etc"),
            (bind("/bin/sh/x", tmp_path / "file"), 20, "bin/sh/x"),
            ({"destination": "/t", "type": "tmpfs", "source": "t", "options": ["size=many"]}, 22, "size=many"),
            ({"destination": "/t", "type": "nofs", "source": "t"}, 19, "nofs"),
        ]
        for mount, errno, words in cases:
            with pytest.raises(StartFailed) as caught:
                await launch.start(SLEEP, mounts=[mount])
            assert caught.value.step == f"mount {mount['destination']}" and caught.value.errno == errno
            assert words in str(caught.value), str(caught.value)

    in_launch(tmp_path, body)
