"""CRI's ImageService: each method translates its request, makes one call on the image store, and translates what comes back.

Methods bear CRI's names, since `dispatch` finds them by those. A method that is not here answers UNIMPLEMENTED.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from tare.cri import translate_replies as replies
from tare.cri import translate_requests as requests
from tare.cri.errors import pull_error
from tare.cri.ports import ImagePort
from tare.cri.v1 import api_pb2 as pb
from tare.errors import TareError

STREAM_BATCH = 100


class ImageService:
    """Images on this node."""

    lasting: frozenset[str] = frozenset({"PullImage", "RemoveImage"})

    def __init__(self, images: ImagePort) -> None:
        self._images = images

    async def ListImages(self, request: pb.ListImagesRequest) -> pb.ListImagesResponse:
        """All images, or the one that the filter names."""
        name = request.filter.image.image
        record = self._images.find(name) if name else None
        found = self._images.list() if not name else [record] if record else []
        return pb.ListImagesResponse(images=[replies.image_item(item) for item in found])

    async def StreamImages(self, request: pb.StreamImagesRequest) -> AsyncIterator[pb.StreamImagesResponse]:
        """As ListImages, some at a time."""
        listed = await self.ListImages(pb.ListImagesRequest(filter=request.filter))
        for start in range(0, len(listed.images), STREAM_BATCH):
            yield pb.StreamImagesResponse(images=listed.images[start : start + STREAM_BATCH])

    async def ImageStatus(self, request: pb.ImageStatusRequest) -> pb.ImageStatusResponse:
        """The image; an answer without one where it is unknown."""
        record = self._images.find(requests.image_name(request))
        if record is None:
            return pb.ImageStatusResponse()
        return pb.ImageStatusResponse(
            image=replies.image_item(record), info=replies.image_info(record) if request.verbose else None
        )

    async def PullImage(self, request: pb.PullImageRequest) -> pb.PullImageResponse:
        """The image's ID, as every other reply has it."""
        name, auth = requests.image_name(request), requests.registry_auth(request)
        try:
            record = await self._images.pull(name, auth)
        except TareError as error:
            raise pull_error(error) from error
        return pb.PullImageResponse(image_ref=record.id)

    async def RemoveImage(self, request: pb.RemoveImageRequest) -> pb.RemoveImageResponse:
        """Idempotent."""
        await self._images.remove(requests.image_name(request))
        return pb.RemoveImageResponse()

    async def ImageFsInfo(self, request: pb.ImageFsInfoRequest) -> pb.ImageFsInfoResponse:
        """Images and writable layers lie on one file system, which is therefore named for both; what they take is told apart."""
        images, containers = (
            pb.FilesystemUsage(
                timestamp=time.time_ns(),
                fs_id=pb.FilesystemIdentifier(mountpoint=usage.path),
                used_bytes=pb.UInt64Value(value=usage.bytes),
                inodes_used=pb.UInt64Value(value=usage.inodes),
            )
            for usage in await self._images.filesystems()
        )
        return pb.ImageFsInfoResponse(image_filesystems=[images], container_filesystems=[containers])
