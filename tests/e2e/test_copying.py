"""`tare cp` through the daemon: containers with and without a user namespace, tar streams both ways, and what it says when it cannot."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.e2e.test_streaming import inside, tare
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
FIRST = 400_000


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("copy") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def mapped_box(node: Node) -> str:
    """A container that sleeps in a user namespace."""
    row = pb.IDMapping(host_id=FIRST, container_id=0, length=65_536)
    user = pb.UserNamespace(mode=pb.POD, uids=[row], gids=[row])
    config = node.pod_config("mapped")
    config.linux.security_context.namespace_options.userns_options.CopyFrom(user)
    pod = node.run_pod(config)
    options = pb.NamespaceOption(pid=pb.CONTAINER, userns_options=user)
    security = pb.LinuxContainerSecurityContext(namespace_options=options)
    return node.start(node.create(pod, node.container_config("mapped", "sleep", "1000", security=security)))


@pytest.fixture(params=["plain", "mapped"])
def box(request: pytest.FixtureRequest, node: Node) -> str:
    """A container that only sleeps, without and with a user namespace."""
    if request.param == "mapped":
        return mapped_box(node)
    return node.start(node.create(node.run_pod("box"), "box", "sleep", "1000"))


def cp(node: Node, *words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(tare(node, "cp", *words), input=data, capture_output=True, timeout=60, check=False)


def done(node: Node, *words: str, data: bytes = b"") -> bytes:
    result = cp(node, *words, data=data)
    assert (result.returncode, result.stderr) == (0, b"")
    return result.stdout


def test_a_tree_both_ways(node: Node, box: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep/file").write_bytes(os.urandom(2 << 20))
    (tree / "link").symlink_to("deep/file")
    (tree / "deep/file").chmod(0o640)
    os.chown(tree / "deep/file", 12, 34)
    done(node, str(tree), f"{box}:/srv-new")
    assert inside(node, box, "stat", "-c", "%u:%g %a", "/srv-new/deep/file") == "0:0 640\n"
    assert inside(node, box, "readlink", "/srv-new/link") == "deep/file\n"
    done(node, "-a", str(tree), f"{box}:/tmp")
    assert inside(node, box, "stat", "-c", "%u:%g", "/tmp/tree/deep/file") == "12:34\n"
    done(node, f"{box}:/tmp/tree/.", str(tmp_path / "plain"))
    done(node, "-a", f"{box}:/tmp/tree/.", str(tmp_path / "kept"))
    owners = [(tmp_path / name / "deep/file").stat() for name in ("plain", "kept")]
    assert [(status.st_uid, status.st_gid) for status in owners] == [(0, 0), (12, 34)]
    assert (tmp_path / "kept/deep/file").read_bytes() == (tree / "deep/file").read_bytes()


def test_tar_streams_both_ways(node: Node, box: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo("made/by/tar")
        info.size, info.uid, info.mode = 5, 7, 0o4755
        archive.addfile(info, io.BytesIO(b"words"))
    done(node, "-", f"{box}:/tmp", data=out.getvalue())
    assert inside(node, box, "stat", "-c", "%u %a", "/tmp/made/by/tar") == "0 755\n"
    done(node, "-a", "-", f"{box}:/tmp", data=out.getvalue())
    assert inside(node, box, "stat", "-c", "%u %a", "/tmp/made/by/tar") == "7 4755\n"
    with tarfile.open(fileobj=io.BytesIO(done(node, f"{box}:/tmp/made", "-"))) as archive:
        assert archive.getnames() == ["made", "made/by", "made/by/tar"]
        assert archive.getmember("made/by/tar").uid == 7


def test_a_containers_links_lead_nowhere_on_the_node(node: Node, box: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    inside(node, box, "ln", "-s", str(secret), "/tmp/out")
    inside(node, box, "ln", "-s", f"/proc/1/root/{secret}", "/tmp/magic")
    inside(node, box, "ln", "-s", str(tmp_path), "/tmp/folder")
    for name in ("out", "magic"):
        assert cp(node, "-L", f"{box}:/tmp/{name}", str(tmp_path / "read")).returncode == 1
        assert cp(node, "/etc/hostname", f"{box}:/tmp/{name}").returncode == 1
    assert b"does not exist" in cp(node, "/etc/hostname", f"{box}:/tmp/folder/secret").stderr
    assert not (tmp_path / "read").exists()
    assert secret.read_text() == "secret"


def test_the_whole_of_a_container_without_the_kernels_file_systems(node: Node, box: str, tmp_path: Path) -> None:
    result = cp(node, f"{box}:/", str(tmp_path / "all"))
    assert result.returncode == 0, result.stderr
    assert b"/proc is left out: it is the kernel's" in result.stderr
    assert (tmp_path / "all/bin").is_dir()
    assert not (tmp_path / "all/proc").exists()
    done(node, f"{box}:/proc/version", str(tmp_path / "version"))
    assert (tmp_path / "version").read_text().startswith("Linux version")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("a", "b"), 2, "one of the two"),
        (("{box}:/a", "{box}:/b"), 2, "one of the two"),
        (("{box}:etc", "/tmp"), 1, "begins with /"),
        (("{box}:/none", "/tmp"), 1, "no such file"),
        (("nobody:/etc", "/tmp"), 1, "nobody"),
        (("/no/such/file", "{box}:/tmp"), 1, "no such file"),
        (("-", "{box}:/none"), 1, "no such directory"),
        (("{box}:/dev/null", "/tmp"), 1, "neither a file"),
        (("/etc/hostname", "{box}:/dev/null"), 1, "neither a file"),
    ],
)
def test_what_it_says_when_it_cannot(node: Node, words: tuple[str, str], code: int, said: str) -> None:
    box = node.start(node.create(node.run_pod("box"), "box", "sleep", "1000"))
    result = cp(node, *(word.replace("{box}", box) for word in words))
    assert (result.returncode, said in result.stderr.decode()) == (code, True), result.stderr
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_container_that_does_not_run_is_told(node: Node) -> None:
    box = node.create(node.run_pod("idle"), "idle", "sleep", "1")
    result = cp(node, f"{box}:/etc", "/tmp")
    assert result.returncode == 1
    assert b"does not run" in result.stderr
