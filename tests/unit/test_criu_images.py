"""CRIU's images, made here: what is read of them, what is refused, and that whatever else is in them is refused too and no more."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from tare.errors import InvalidArgument
from tare.handlers import criu_images
from tare.handlers.v1 import criu_pb2 as pb

COMMON = struct.pack("<I", 0x54564319)
KIND = b"kind"
NAMES = ("inventory", "pstree", "ids-1", "mountpoints-9", "files", "core-1", "netns-4")


def image(*messages: Message, common: bool = True) -> bytes:
    parts = [COMMON + KIND if common else KIND]
    for message in messages:
        data = message.SerializeToString()
        parts += [struct.pack("<I", len(data)), data]
    return b"".join(parts)


def mount(point: str, kind: int, **more: Any) -> pb.MountEntry:
    fields: dict[str, Any] = {"mnt_id": 1, "root_dev": 1, "parent_mnt_id": 0, "flags": 0, "root": "/", "source": "x"}
    return pb.MountEntry(fstype=kind, mountpoint=point, options="", **(fields | more))


def thread(**more: Any) -> pb.CoreEntry:
    fields: dict[str, Any] = {"uid": 0, "gid": 0, "cap_bnd": [1, 0], "no_new_privs": 1}
    creds = pb.Credentials(**(fields | more))
    return pb.CoreEntry(mtype=1, thread_core=pb.ThreadEntry(creds=creds, seccomp_mode=2))


def write(directory: Path, **changed: bytes) -> Path:
    """A container's images, some of them others."""
    node = pb.NamespaceIds(net_ns_id=1, ipc_ns_id=2, uts_ns_id=3, user_ns_id=4)
    own = pb.NamespaceIds(net_ns_id=11, ipc_ns_id=12, uts_ns_id=13, user_ns_id=4)
    socket = pb.SocketEntry(
        id=1,
        ino=1,
        family=2,
        type=1,
        proto=6,
        state=1,
        src_port=1,
        dst_port=2,
        src_addr=[struct.unpack("=I", bytes([127, 0, 0, 1]))[0]],
    )
    files = [
        pb.FileEntry(type=4, id=1, isk=socket),
        pb.FileEntry(type=2, id=2, pipe=pb.PipeEntry(id=2, pipe_id=77)),
        pb.FileEntry(type=1, id=3, reg=pb.RegularEntry(id=3, name="file[1:2]", ext=True)),
    ]
    whole = {
        "inventory": image(pb.Inventory(img_version=1, root_ids=node), common=False),
        "pstree": image(pb.TreeEntry(pid=1, ppid=0)),
        "ids-1": image(own),
        "mountpoints-9": image(mount("/", 17), mount("/proc", 1), mount("/etc/hosts", 0, ext_key="/etc/hosts")),
        "files": image(*files),
        "core-1": image(thread()),
        "netns-4": image(pb.NetEntry(ext_key="extRootNetNS")),
    }
    for name, data in (whole | {key.replace("_", "-"): value for key, value in changed.items()}).items():
        (directory / f"{name}.img").write_bytes(data)
    return directory


def check(found: criu_images.Found, **more: Any) -> None:
    criu_images.check(found, "restore", **({"capabilities": 1, "filtered": True, "confined": True} | more))


def test_what_is_said(tmp_path: Path) -> None:
    found = criu_images.look(write(tmp_path))
    assert found.external == {"/etc/hosts": "/etc/hosts"}
    assert found.pipes == {"pipe:[77]", "file[1:2]"} and found.local == {"127.0.0.1"}
    assert found.namespaces == {"network", "ipc", "uts"} and found.external_network and not found.external_pids
    assert (found.processes, found.capabilities, found.objects) == (1, 1, False)
    check(found)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mountpoints_9": image(mount("/", 17), mount("/mnt", 0, fsname="ext4", source="/dev/vda"))}, "ext4"),
        ({"mountpoints_9": image(mount("/", 17), mount("/mnt", 5, with_plugin=True))}, "/mnt"),
        ({"mountpoints_9": image(mount("/", 17), mount("/mnt", 17))}, "/mnt"),
        ({"core_1": image(thread(cap_eff=[0, 1]))}, "capabilities that it is not to have: 32"),
        ({"core_1": image(pb.CoreEntry(mtype=1, thread_core=pb.ThreadEntry()))}, "seccomp"),
        ({"ids_1": image(pb.NamespaceIds(user_ns_id=9))}, "user namespace"),
        ({"core_1": image(thread(euid=7, suid=7), thread(lsm_profile="loose", uid=7, euid=7, suid=7))}, "is root"),
        (
            {"core_1": image(thread(lsm_profile="loose", uid=7, euid=7, suid=7))},
            "by tight, and in the checkpoint is by loose",
        ),
    ],
)
def test_what_the_configuration_does_not_allow_is_refused(
    tmp_path: Path, changed: dict[str, bytes], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check(criu_images.look(write(tmp_path, **changed)), user=7, profile="tight")


def test_a_container_that_may_more_may_be_restored_less_confined(tmp_path: Path) -> None:
    loose = image(pb.CoreEntry(mtype=1, thread_core=pb.ThreadEntry(creds=pb.Credentials(uid=0, gid=0, cap_bnd=[1]))))
    found = criu_images.look(write(tmp_path, core_1=loose))
    with pytest.raises(InvalidArgument, match="new privileges"):
        check(found, filtered=False)
    check(found, filtered=False, confined=False)


def test_namespaces_that_are_to_be_inherited_are_criu_s_own(tmp_path: Path) -> None:
    """And nothing else of the inventory changes; doing it again changes nothing."""
    write(tmp_path)
    kept = tmp_path / "kept.img"
    kept.hardlink_to(tmp_path / "inventory.img")
    before = kept.read_bytes()
    for _ in range(2):
        criu_images.inherit(tmp_path, ["uts"])
        found = criu_images.look(tmp_path)
        assert found.namespaces == {"network", "ipc"}
    assert kept.read_bytes() == before
    criu_images.inherit(tmp_path, ["uts", "ipc"])
    assert criu_images.look(tmp_path).namespaces == {"network"}


@given(name=st.sampled_from(NAMES), data=st.binary(max_size=200), magic=st.booleans())
def test_anything_else_is_refused_and_no_more(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: bytes, magic: bool
) -> None:
    directory = tmp_path_factory.mktemp("images")
    write(directory)
    (directory / f"{name}.img").write_bytes((COMMON + KIND if magic else b"") + data)
    with contextlib.suppress(InvalidArgument):
        check(criu_images.look(directory))


@pytest.mark.parametrize("name", NAMES[:5])
def test_an_image_that_is_missing_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / f"{name}.img").unlink()
    with pytest.raises(InvalidArgument):
        criu_images.look(tmp_path)
