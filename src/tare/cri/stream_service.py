"""The part of CRI's RuntimeService that answers in streams: lists in pieces, and events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import Final, TypeVar

from google.protobuf.message import Message

from tare.cri import filters
from tare.cri import translate_replies as replies
from tare.cri.ports import RuntimePort
from tare.cri.v1 import api_pb2 as pb
from tare.runtime.events import Event

# A kubelet takes 16 MiB in one message; annotations may be long, and a first piece should come soon.
PIECE_ITEMS: Final = 250
PIECE_BYTES: Final = 1 << 20
M = TypeVar("M", bound=Message)


class StreamService:
    """CRI's methods that answer more than once. Of a list, each item comes once, as it was when the call was made."""

    def __init__(self, runtime: RuntimePort) -> None:
        self._source = runtime

    async def StreamPodSandboxes(
        self, request: pb.StreamPodSandboxesRequest
    ) -> AsyncGenerator[pb.StreamPodSandboxesResponse]:
        """As ListPodSandbox."""
        found = filters.pod_filter(request).select(self._source.list_pods())
        for piece in pieces(map(replies.pod_item, found)):
            yield pb.StreamPodSandboxesResponse(pod_sandboxes=piece)

    async def StreamContainers(
        self, request: pb.StreamContainersRequest
    ) -> AsyncGenerator[pb.StreamContainersResponse]:
        """As ListContainers."""
        found = filters.container_filter(request).select(self._source.list_containers())
        for piece in pieces(map(replies.container_item, found)):
            yield pb.StreamContainersResponse(containers=piece)

    def GetContainerEvents(self, request: pb.GetEventsRequest) -> AsyncGenerator[pb.ContainerEventResponse]:
        """Every event from this call on."""
        return translated(self._source.events())


async def translated(events: AsyncGenerator[Event]) -> AsyncGenerator[pb.ContainerEventResponse]:
    """As CRI shows them."""
    try:
        async for event in events:
            yield replies.event(event)
    finally:
        await events.aclose()


def pieces(items: Iterable[M]) -> Iterator[list[M]]:
    """All of the items, none twice, in pieces of a bounded size."""
    piece: list[M] = []
    size = 0
    for item in items:
        piece.append(item)
        size += item.ByteSize()
        if len(piece) == PIECE_ITEMS or size >= PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
