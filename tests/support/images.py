"""Images made from Python values: trees of files become layers, layers and a configuration become an OCI image layout.

A tree maps paths to what is there:

    {"etc/motd": "hello", "bin": Directory(), "bin/sh": Symlink("busybox"), "bin/ls": Hardlink("bin/busybox"),
     "dev/tty": Device("c", 5, 0), "run/pipe": Fifo(), "gone": Whiteout(), "var/cache": Opaque(), "bin/x": File(b"…", mode=0o4755)}

Parents need not be listed. `make_image` writes a layout that skopeo, umoci and podman read; `busybox_image` makes one to
run containers from, of the busybox binary on this machine.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backports import zstd

OCI = "application/vnd.oci.image."
MTIME = 1_600_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """What any file has. `mtime` in seconds; `xattrs` by full name ("user.x")."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: float = MTIME
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class File(Meta):
    """A regular file."""

    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Directory(Meta):
    """A directory."""


@dataclass(frozen=True, slots=True)
class Symlink(Meta):
    """A symbolic link to `target`."""

    target: str


@dataclass(frozen=True, slots=True)
class Hardlink(Meta):
    """Another name of the file at `target`, which must come earlier in the tree."""

    target: str


@dataclass(frozen=True, slots=True)
class Device(Meta):
    """A device: `kind` is "c" or "b"."""

    kind: str
    major: int
    minor: int


@dataclass(frozen=True, slots=True)
class Fifo(Meta):
    """A named pipe."""


@dataclass(frozen=True, slots=True)
class Whiteout:
    """The name is gone from the layers below."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """All that the layers below have in this directory is gone."""


Node = Meta | Whiteout | Opaque | str | bytes
Tree = Mapping[str, Node]

TYPES: dict[type[Meta], bytes] = {
    File: tarfile.REGTYPE,
    Directory: tarfile.DIRTYPE,
    Symlink: tarfile.SYMTYPE,
    Hardlink: tarfile.LNKTYPE,
    Fifo: tarfile.FIFOTYPE,
}


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes with their digest."""

    data: bytes

    @property
    def digest(self) -> str:
        """sha256:hex."""
        return "sha256:" + hashlib.sha256(self.data).hexdigest()

    def descriptor(self, media_type: str, **more: object) -> dict[str, object]:
        """The OCI descriptor of these bytes."""
        return {"mediaType": media_type, "digest": self.digest, "size": len(self.data), **more}


def tar_of(tree: Tree | Sequence[tuple[str, Node]]) -> bytes:
    """A tree as a PAX tar archive, in the tree's order; as pairs where a name is to come twice."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, node in tree.items() if isinstance(tree, Mapping) else tree:
            member, data = member_of(path, node)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def member_of(path: str, node: Node) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of an archive and its data."""
    directory, _, name = path.rpartition("/")
    if isinstance(node, Whiteout):
        return member_of(f"{directory}/.wh.{name}".lstrip("/"), File(b""))
    if isinstance(node, Opaque):
        return member_of(f"{path}/.wh..wh..opq".lstrip("/"), File(b""))
    if isinstance(node, str | bytes):
        node = File(node.encode() if isinstance(node, str) else node, mode=0o644)
    member = tarfile.TarInfo(path)
    if isinstance(node, Device):
        member.type = tarfile.CHRTYPE if node.kind == "c" else tarfile.BLKTYPE
        member.devmajor, member.devminor = node.major, node.minor
    else:
        member.type = TYPES[type(node)]
    if isinstance(node, Symlink | Hardlink):
        member.linkname = node.target
    data = node.data if isinstance(node, File) else b""
    member.size, member.mode, member.uid, member.gid, member.mtime = (
        len(data),
        node.mode,
        node.uid,
        node.gid,
        node.mtime,
    )
    member.pax_headers = {
        f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape") for key, value in node.xattrs.items()
    }
    return member, data


def compressed(data: bytes, compression: str) -> bytes:
    """`data` as "gzip", "zstd" or "" (as it is)."""
    if compression == "gzip":
        return gzip.compress(data, compresslevel=1, mtime=0)
    return zstd.compress(data) if compression == "zstd" else data


def layer_media_type(compression: str) -> str:
    """The media type of a layer so compressed."""
    return OCI + "layer.v1.tar" + {"gzip": "+gzip", "zstd": "+zstd", "": ""}[compression]


class Layout:
    """An OCI image layout that is being written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self._tags: dict[str, dict[str, object]] = {}

    def add(self, data: bytes) -> Blob:
        """Store a blob."""
        blob = Blob(data)
        (self.directory / "blobs/sha256" / blob.digest.partition(":")[2]).write_bytes(data)
        return blob

    def add_json(self, value: object) -> Blob:
        """Store a document."""
        return self.add(json.dumps(value).encode())

    def tag(self, name: str, descriptor: dict[str, object]) -> None:
        """Give a manifest or an index a tag."""
        self._tags[name] = {**descriptor, "annotations": {"org.opencontainers.image.ref.name": name}}
        (self.directory / "index.json").write_text(
            json.dumps({"schemaVersion": 2, "manifests": list(self._tags.values())})
        )

    def image(
        self,
        layers: Sequence[Tree | bytes],
        *,
        config: Mapping[str, object] | None = None,
        compression: str = "gzip",
        platform: Mapping[str, str] | None = None,
        diff_ids: Sequence[str] | None = None,
    ) -> dict[str, object]:
        """Store an image of `layers` (trees, or tar archives) and return its manifest's descriptor.

        `config` is the OCI config object ({"Cmd": […], "Env": […]}); `diff_ids` replaces the right ones.
        """
        archives = [layer if isinstance(layer, bytes) else tar_of(layer) for layer in layers]
        blobs = [self.add(compressed(archive, compression)) for archive in archives]
        where: dict[str, Any] = dict(platform or {"os": "linux", "architecture": "amd64"})
        configuration = self.add_json(
            {
                **where,
                "config": dict(config or {}),
                "rootfs": {
                    "type": "layers",
                    "diff_ids": list(diff_ids or [Blob(archive).digest for archive in archives]),
                },
                "history": [{"created_by": "tests"} for _ in archives],
            }
        )
        manifest_type = OCI + "manifest.v1+json"
        manifest = {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": configuration.descriptor(OCI + "config.v1+json"),
            "layers": [blob.descriptor(layer_media_type(compression)) for blob in blobs],
        }
        return self.add_json(manifest).descriptor(manifest_type, platform=where)

    def index(self, manifests: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """Store an image index and return its descriptor."""
        media_type = OCI + "index.v1+json"
        index = {"schemaVersion": 2, "mediaType": media_type, "manifests": list(manifests)}
        return self.add_json(index).descriptor(media_type)


def make_image(
    directory: Path,
    layers: Sequence[Tree | bytes],
    *,
    config: Mapping[str, object] | None = None,
    compression: str = "gzip",
    diff_ids: Sequence[str] | None = None,
) -> Path:
    """A layout in `directory` that holds one image, tagged `latest`; see `Layout.image`. Returns the directory."""
    layout = Layout(directory)
    layout.tag("latest", layout.image(layers, config=config, compression=compression, diff_ids=diff_ids))
    return directory


def busybox_tree(binary: str = "/bin/busybox") -> dict[str, Node]:
    """A root filesystem of busybox: its applets under /bin, users root, daemon and nobody, and the usual empty directories."""
    listed = subprocess.run([binary, "--list"], capture_output=True, text=True, check=True, timeout=30)
    tree: dict[str, Node] = {"bin": Directory(), "bin/busybox": File(Path(binary).read_bytes())}
    tree |= {f"bin/{applet}": Hardlink("bin/busybox") for applet in listed.stdout.split() if applet != "busybox"}
    tree |= {name: Directory() for name in ("dev", "etc", "home", "proc", "root", "sys", "usr", "var")}
    tree |= {"tmp": Directory(mode=0o1777), "usr/bin": Symlink("../bin"), "sbin": Symlink("bin")}
    tree["etc/passwd"] = (
        "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n"
    )
    tree["etc/group"] = "root:x:0:\ndaemon:x:1:\nstaff:x:50:daemon\nnogroup:x:65534:\n"
    return tree


def busybox_image(
    directory: Path, *, config: Mapping[str, object] | None = None, extra: Sequence[Tree | bytes] = ()
) -> Path:
    """A layout with an image to run containers from: busybox, and the layers of `extra` over it. `config` as for `make_image`."""
    standard: dict[str, object] = {"Env": ["PATH=/bin:/usr/bin:/sbin"], "Cmd": ["sh"]}
    return make_image(directory, [busybox_tree(), *extra], config={**standard, **(config or {})})
