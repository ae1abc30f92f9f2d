"""A pod's directory: the files that its containers see as /etc/hosts, /etc/hostname and /etc/resolv.conf, and their /dev/shm.

    <run>/pods/<pod id>/hosts, hostname, resolv.conf
                        shm/                      a tmpfs, unless the pod has the node's IPC namespace
                        user, net, ipc, uts, pid  pinned namespaces (the handler's)

What the files say is computed from values; the functions at the end write, mount and remove, and are idempotent. `Owner` says whose
the files are: the pod's root, which a user namespace makes somebody else on the node, and the SELinux label of the pod's files.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tare.launch import linux
from tare.network import files
from tare.runtime.labels import mount_data
from tare.runtime.records import DnsConfig, NamespaceMode, PodConfig

SHM_OPTIONS = "mode=1777,size=67108864"
SHM_FLAGS = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
SELINUX_ATTRIBUTE = "security.selinux"
FILES = ("hosts", "hostname", "resolv.conf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """UID and GID of the pod's root on the node, and the label of the pod's files ("" for none)."""

    uid: int = 0
    gid: int = 0
    label: str = ""


def contents(config: PodConfig, hostname: str, ips: Sequence[str]) -> dict[str, bytes]:
    """The files of a pod, by name. What the request leaves open is the node's: its resolver, and its hosts with the node's network.

    Raises InvalidArgument for values that no such file can hold.
    """
    dns = config.dns or DnsConfig()
    on_node = config.security.namespaces.network is NamespaceMode.NODE
    resolvers = [text for path in files.HOST_RESOLV_CONF if (text := of_the_node(path)) is not None]
    resolver = files.resolv_conf(
        dns.servers, dns.searches, dns.options, files.host_resolv_conf(resolvers), host_network=on_node
    )
    hosts = of_the_node("/etc/hosts") if on_node else None
    texts = {
        "hosts": hosts if hosts is not None else files.hosts_file(hostname, ips),
        "hostname": files.hostname_file(hostname),
        "resolv.conf": resolver,
    }
    return {name: text.encode(errors="surrogateescape") for name, text in texts.items()}


def of_the_node(path: str) -> str | None:
    """The text of a file of the node, or None."""
    try:
        return Path(path).read_bytes().decode(errors="surrogateescape")
    except FileNotFoundError:
        return None


def write(directory: Path, texts: dict[str, bytes], owner: Owner) -> None:
    """Write the files, readable by all and the pod's root's to change."""
    for name, content in texts.items():
        fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.fchmod(fd, 0o644)
            os.write(fd, content)
            os.fchown(fd, owner.uid, owner.gid)
            if owner.label:
                os.setxattr(fd, SELINUX_ATTRIBUTE, owner.label.encode())
        finally:
            os.close(fd)


def mount_shm(directory: Path, owner: Owner) -> None:
    """Mount the pod's /dev/shm: 64 MiB."""
    path = directory / "shm"
    path.mkdir(exist_ok=True)
    if not os.path.ismount(path):
        options = f"{SHM_OPTIONS},uid={owner.uid},gid={owner.gid}"
        options += f",{mount_data(owner.label)}" if owner.label else ""
        linux.mount(b"shm", os.fsencode(path), b"tmpfs", SHM_FLAGS, options.encode())


def unmount_shm(directory: Path) -> None:
    """Unmount it, however often it is mounted."""
    path = os.fsencode(directory / "shm")
    try:
        while True:
            linux.umount(path, linux.MNT_DETACH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def remove(directory: Path) -> None:
    """Remove the directory with everything that this module makes in it; anything else in it is an error."""
    unmount_shm(directory)
    if not directory.exists():
        return
    for name in FILES:
        (directory / name).unlink(missing_ok=True)
    if (directory / "shm").exists():
        (directory / "shm").rmdir()
    directory.rmdir()
