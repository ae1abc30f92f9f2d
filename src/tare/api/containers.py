"""The service tare.v1.Containers, beside CRI's."""

from __future__ import annotations

from tare.api.v1 import tare_pb2 as pb
from tare.runtime import renewing


class Containers:
    """Over the runtime."""

    lasting: frozenset[str] = frozenset({"Renew"})

    def __init__(self, runtime: renewing.Containers) -> None:
        self._runtime = runtime

    async def Renew(self, request: pb.RenewRequest) -> pb.RenewReply:
        """From another image."""
        renewed = await renewing.renew(self._runtime, request.container_id, request.image, float(request.timeout))
        return pb.RenewReply(container_id=renewed.id, trouble=renewed.trouble)
