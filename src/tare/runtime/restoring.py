"""Containers that are made from a checkpoint: an archive on the node, or an image that is one.

    image is an absolute path                                     an archive (`checkpoint_archive`)
    image is annotated org.criu.checkpoint.container.name,        its layer has what an archive has
    or io.kubernetes.cri-o.annotations.checkpoint.name

CreateContainer takes what is needed of it, finds the image that the container stood on, and checks all that can be known: whether the request says
what is to be at each of its mounts, gives it no less confinement than its processes have, and has its streams. The process is made by
StartContainer, or by RestorePod, which leaves it standing still. What the request says of command, environment and user has no effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.errors import FailedPrecondition, InvalidArgument, NotFound
from tare.handlers import capabilities, criu_images
from tare.images.unpack import Limits
from tare.runtime import checkpoint_archive as archive
from tare.runtime.bounds import kernel_errors
from tare.runtime.checkpoint import BUILTIN
from tare.runtime.pods import kinds_of
from tare.runtime.store import Checkpointed

if TYPE_CHECKING:
    from tare.images.records import ImageRecord
    from tare.runtime.creating import Creation
    from tare.runtime.ports import Parts
    from tare.runtime.records import ContainerConfig, PodRecord

ANNOTATIONS = ("org.criu.checkpoint.container.name", "io.kubernetes.cri-o.annotations.checkpoint.name")
TCP = "tare.checkpoint.tcp"  # an annotation of the container: "established" or "close"


async def find_checkpoint(creation: Creation) -> None:
    """What the container is to be restored from, if its image is a checkpoint. Raises FailedPrecondition, InvalidArgument, NotFound."""
    asked, parts = creation.asked, creation.parts
    reference = asked.config.image.image
    image = None if reference.startswith("/") else parts.images.find(reference)
    if not reference.startswith("/") and (image is None or not any(name in image.annotations for name in ANNOTATIONS)):
        return
    doing = f"restore container {asked.config.metadata.name}"
    check_request(asked.config, asked.pod, doing)
    await parts.criu.require(doing)
    directory = parts.checkpoints.restored(creation.id)
    with kernel_errors(doing):
        await parts.checkpoints.make(directory)
    if image is None:
        await take_archive(reference, directory, doing)
    else:
        await parts.images.check_trust(image, asked.config.image.user_specified_image or reference)
        with kernel_errors(doing):
            await asyncio.to_thread(take_layers, parts.images.layer_paths(image), directory, doing)
    creation.described = await asyncio.to_thread(archive.read, directory, doing)
    creation.base = base_image(parts, creation.described, doing)


def check_request(config: ContainerConfig, pod: PodRecord, doing: str) -> None:
    """Raise FailedPrecondition for what cannot be restored."""
    if pod.handler not in BUILTIN:
        cause = f"its pod's runtime handler is {pod.handler}; only the built-in one restores"
        raise FailedPrecondition(doing, cause=cause)
    if "user" in kinds_of(pod.config):
        raise FailedPrecondition(doing, cause="its pod has a user namespace, into which nothing can be restored")
    if config.tty:
        raise FailedPrecondition(doing, cause="it is to have a terminal, which cannot be restored")


async def take_archive(path: str, directory: Path, doing: str) -> None:
    """Out of a file of the node."""
    try:
        await asyncio.to_thread(archive.take, Path(path), directory, doing)
    except FileNotFoundError as error:
        raise NotFound(doing, cause=f"there is no checkpoint {path}") from error
    except OSError as error:
        raise InvalidArgument(doing, cause=error) from error


def take_layers(layers: Collection[Path], directory: Path, doing: str) -> None:
    """Out of an image: hard links to the files of its layer, which may go before the container does. Blocks. Raises InvalidArgument, OSError."""
    fitting = [layer for layer in layers if (layer / archive.CONFIG).is_file()]
    if not fitting:
        raise InvalidArgument(doing, cause=f"the image has no {archive.CONFIG}", hint="is it one of a checkpoint?")
    archive.check(fitting[0], doing)
    (directory / archive.IMAGES).mkdir(mode=0o700)
    names = [name for name in archive.TAKEN if (fitting[0] / name).exists()]
    names += [f"{archive.IMAGES}/{name}" for name in os.listdir(fitting[0] / archive.IMAGES)]
    for name in names:
        try:
            os.link(fitting[0] / name, directory / name, follow_symlinks=False)
        except OSError:  # another file system, or too many links
            shutil.copyfile(fitting[0] / name, directory / name, follow_symlinks=False)


def base_image(parts: Parts, described: archive.Described, doing: str) -> str:
    """The image that the container stood on, by a name under which it is here. Raises NotFound."""
    names = [name for name in (described.image_ref, described.image) if name]
    for name in names:
        found: ImageRecord | None = None
        with contextlib.suppress(InvalidArgument):
            found = parts.images.find(name)
        if found is not None:
            return name
    wanted = described.image or described.image_ref
    raise NotFound(
        doing, cause=f"the image that it stood on is not here: {' or '.join(names)}", hint=f"pull {wanted} first"
    )


async def forget_checkpoint(creation: Creation) -> None:
    """It goes."""
    await creation.parts.checkpoints.remove(creation.parts.checkpoints.restored(creation.id))


async def check_checkpoint(creation: Creation) -> None:
    """The images against the configuration. Raises InvalidArgument, FailedPrecondition."""
    if creation.described is None:
        return
    assert creation.plan is not None
    parts, doing = creation.parts, f"restore container {creation.asked.config.metadata.name}"
    directory = parts.checkpoints.restored(creation.id)
    images = directory / archive.IMAGES
    found = await asyncio.to_thread(criu_images.look, images)
    spec = creation.plan.spec
    bounding, _ = capabilities.mask((spec["process"].get("capabilities") or {}).get("bounding") or ())
    criu_images.check(
        found,
        doing,
        capabilities=bounding,
        filtered="seccomp" in spec["linux"],
        confined=bool(spec["process"].get("noNewPrivileges")),
        user=spec["process"]["user"]["uid"],
        profile=spec["process"].get("apparmorProfile") or spec["process"].get("selinuxLabel") or "",
    )
    if any((spec.get("hooks") or {}).values()):
        raise FailedPrecondition(doing, cause="it has hooks (of devices or plugins), which a restore does not run")
    check_namespaces(found, spec, doing)
    check_hidden(found, spec, doing)
    keys = tuple(dict.fromkeys(found.external.values()))
    parts.criu.check_mounts(spec, keys, doing)
    streams = check_streams(creation.asked.config, creation.described.streams, found, doing)
    checkpoint = Checkpointed(
        images=str(images),
        work=str(directory),
        external=keys,
        streams=streams,
        objects=found.objects,
        established=goes_on(creation.asked.config.annotations, found, creation.asked.pod, doing),
    )
    creation.plan = replace(creation.plan, checkpoint=checkpoint)


def check_namespaces(found: criu_images.Found, spec: Mapping[str, Any], doing: str) -> None:
    """What the container shared with its pod, or had for itself, it is to have that way again."""
    kinds = {item["type"]: item.get("path") or "" for item in spec["linux"]["namespaces"]}
    for kind in criu_images.KINDS:
        if (kind in kinds) != (kind in found.namespaces):
            whose = ("the pod's", "the node's") if kind in kinds else ("the node's", "a pod's")
            cause = f"its {kind} namespace is to be {whose[0]}, and in the checkpoint was {whose[1]}"
            raise InvalidArgument(doing, cause=cause)
    if ("network" in kinds) != (found.external_network):
        raise InvalidArgument(doing, cause="its network namespace was dumped with it, and cannot be its pod's")
    if bool(kinds.get("pid")) != found.external_pids or "pid" not in kinds:
        raise InvalidArgument(doing, cause="its PID namespace is not shared in the way in which it was")


def check_hidden(found: criu_images.Found, spec: Mapping[str, Any], doing: str) -> None:
    """What is to be masked or read-only is so in the checkpoint."""
    points = {entry.mountpoint for entry in found.mounts}
    linux = spec["linux"]
    for path in (*(linux.get("maskedPaths") or ()), *(linux.get("readonlyPaths") or ())):
        if path not in points and path.startswith(("/proc/", "/sys/")) and os.path.lexists(path):
            raise InvalidArgument(doing, cause=f"{path} is to be masked or read-only, and in the checkpoint is not")
    if spec["root"].get("readonly") and not found.readonly_root:
        raise InvalidArgument(doing, cause="its root is to be read-only, and in the checkpoint is not")


def check_streams(
    config: ContainerConfig, keys: tuple[str, str, str], found: criu_images.Found, doing: str
) -> tuple[str, str, str]:
    """The keys of the streams, of those that are in the images."""
    stdin, stdout, stderr = (key if key in found.pipes else "" for key in keys)
    if bool(stdin) != config.stdin:
        cause = (
            "its stdin is to be held open, and was not" if config.stdin else "its stdin was held open, and is not to be"
        )
        raise InvalidArgument(doing, cause=cause)
    return stdin, stdout, stderr


def goes_on(annotations: Mapping[str, str], found: criu_images.Found, pod: PodRecord, doing: str) -> bool:
    """Whether TCP connections go on: where the pod has the addresses of this side of all of them, unless the annotation says otherwise."""
    wanted = annotations.get(TCP, "")
    if wanted not in ("", "established", "close"):
        raise InvalidArgument(doing, cause=f"annotation {TCP} is {wanted!r}, not established or close")
    if wanted:
        return wanted == "established"
    here = {str(ipaddress.ip_address(ip)) for ip in pod.ips}
    return all(address in here or ipaddress.ip_address(address).is_loopback for address in found.local)


async def lay_files(creation: Creation) -> None:
    """What the container had changed in its root file system, and left in /dev/shm. Raises InvalidArgument, ResourceExhausted."""
    described = creation.described
    if described is None:
        return
    parts, doing = creation.parts, f"restore container {creation.asked.config.metadata.name}"
    directory = parts.checkpoints.restored(creation.id)
    upper = parts.snapshots.get(creation.id, creation.lowers).upper
    shared = parts.pod_directory(creation.asked.pod.id) / "shm"
    with kernel_errors(doing):
        limits = Limits(size=max(0, archive.free(upper)))
        lay = partial(archive.lay, directory, described.deleted, upper, creation.lowers, limits, doing)
        await asyncio.to_thread(lay)
        if (directory / archive.SHARED).exists() and "ipc" in kinds_of(creation.asked.pod.config):
            await asyncio.to_thread(archive.lay_shared, directory, shared, doing)
