"""Image volumes: what a container's mounts of images come to. Source: CRI Mount, `image` and `image_sub_path`.

Everything is looked at when the container is created; the layers are held for it as those that it stands on are, so that the
image may be removed meanwhile. An artifact is an image of one layer here, a directory of its blobs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tare.errors import InvalidArgument, UnknownError
from tare.handlers.volumes import joined
from tare.runtime.records import ContainerConfig, Mount
from tare.storage import union

if TYPE_CHECKING:
    from tare.images.records import ImageRecord
    from tare.runtime.ports import Images


class ImageVolumeMountFailed(UnknownError):
    """An image volume cannot be mounted. The kubelet matches the message's first word."""

    def __init__(self, mount: Mount, cause: BaseException | str, hint: str | None = None) -> None:
        name = mount.image.user_specified_image or mount.image.image if mount.image else ""
        doing = f"ImageVolumeMountFailed: mount image {name} at {mount.container_path}"
        super().__init__(doing, cause=cause, hint=hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageVolume:
    """An image that is mounted: `image_id` is its ID, `chain_ids` its layers, `lowers` their directories, top first."""

    image_id: str
    chain_ids: tuple[str, ...]
    lowers: tuple[Path, ...]

    @property
    def option(self) -> str:
        """The mount option that names the layers."""
        return joined([str(path) for path in self.lowers])


def find(images: Images, mount: Mount) -> ImageRecord:
    """The image of a mount. Raises ImageVolumeMountFailed."""
    assert mount.image is not None
    try:
        return mountable(mount, images.find(mount.image.image))
    except InvalidArgument as error:
        raise ImageVolumeMountFailed(mount, error) from error


def mountable(mount: Mount, record: ImageRecord | None) -> ImageRecord:
    """The image that was found for a mount. Raises ImageVolumeMountFailed where it cannot be mounted so."""
    if not mount.readonly:
        raise ImageVolumeMountFailed(mount, "an image can be mounted read-only alone", "set readonly")
    if record is None:
        raise ImageVolumeMountFailed(mount, "there is no such image", "pull it first")
    if not record.chain_ids:
        raise ImageVolumeMountFailed(mount, "the image has no layers")
    return record


async def look(images: Images, mount: Mount, record: ImageRecord) -> ImageVolume:
    """What a mount's image comes to. Raises ImageVolumeMountFailed, or SignatureValidationFailed where the policy does not allow it."""
    assert mount.image is not None
    await images.check_trust(record, mount.image.user_specified_image or mount.image.image)
    lowers = images.layer_paths(record)
    await check_sub_path(mount, lowers)
    return ImageVolume(image_id=record.id, chain_ids=record.chain_ids, lowers=lowers)


async def check_sub_path(mount: Mount, lowers: Sequence[Path]) -> None:
    """Raise ImageVolumeMountFailed where the sub path is not there, or not a directory or a file of the image's."""
    if not mount.image_sub_path:
        return
    if mount.image_sub_path.startswith("/") or ".." in mount.image_sub_path.split("/"):
        raise ImageVolumeMountFailed(mount, f"sub path {mount.image_sub_path!r} is not a path within the image")
    try:
        kind = await asyncio.to_thread(union.kind, lowers, mount.image_sub_path)
    except OSError as error:
        raise ImageVolumeMountFailed(mount, error) from error
    if kind is None:
        raise ImageVolumeMountFailed(mount, f"sub path {mount.image_sub_path!r} does not exist in the image")
    if kind is union.Kind.OTHER:
        cause = f"sub path {mount.image_sub_path!r} is neither a directory nor a file"
        raise ImageVolumeMountFailed(mount, cause)


def resolved(config: ContainerConfig, volumes: dict[str, ImageVolume]) -> ContainerConfig:
    """The configuration with what its mounts' images turned out to be, by the mounts' container paths."""
    mounts = tuple(
        replace(mount, image=replace(mount.image, image_ref=volumes[mount.container_path].image_id))
        if mount.image is not None
        else mount
        for mount in config.mounts
    )
    return replace(config, mounts=mounts)
