"""The CRI socket as the commands see it: calls that return answers or raise `CallFailed` in plain words."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from tare.errors import TareError

if TYPE_CHECKING:
    import grpc

    from tare.cri.v1 import api_pb2

DEFAULT_SOCKET = "/run/tare/tare.sock"
MAX_MESSAGE = 64 << 20
CALL_SECONDS = 120.0
CONNECT_SECONDS = 2.0
A = TypeVar("A")


class CallFailed(TareError):
    """The daemon refused, failed, or could not be reached. `status` is the gRPC code's name."""

    def __init__(self, doing: str, *, status: str, hint: str | None = None) -> None:
        super().__init__(doing, hint=hint)
        self.status = status


class Client:
    """A connection to a CRI server. A context manager."""

    def __init__(self, socket: str) -> None:
        import grpc

        from tare.api.v1 import tare_pb2_grpc
        from tare.cri.v1 import api_pb2_grpc

        self.socket = socket
        options = [("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)]
        self._channel = grpc.insecure_channel(f"unix:{os.path.abspath(socket)}", options=options)
        self.runtime: Any = api_pb2_grpc.RuntimeServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self.images: Any = api_pb2_grpc.ImageServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self.tare: Any = tare_pb2_grpc.ImagesStub(self._channel)  # type: ignore[no-untyped-call]
        self.renewal: Any = tare_pb2_grpc.ContainersStub(self._channel)  # type: ignore[no-untyped-call]
        self.networks: Any = tare_pb2_grpc.NetworksStub(self._channel)  # type: ignore[no-untyped-call]
        self.node: Any = tare_pb2_grpc.NodeStub(self._channel)  # type: ignore[no-untyped-call]
        self.supervision: Any = tare_pb2_grpc.SupervisionStub(self._channel)  # type: ignore[no-untyped-call]
        self.daemon: Any = tare_pb2_grpc.DaemonStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def call(self, method: Callable[..., A], request: object, timeout: float | None = CALL_SECONDS) -> A:
        """One answer. Raises CallFailed."""
        import grpc

        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise self.failure(error) from error

    def stream(self, method: Callable[..., Iterable[A]], request: object, timeout: float | None = None) -> Iterator[A]:
        """Answers one after the other. Raises CallFailed."""
        import grpc

        try:
            yield from method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise self.failure(error) from error

    def failure(self, error: grpc.RpcError) -> CallFailed:
        """What to tell of a call that failed."""
        status: str = error.code().name
        text: str = error.details() or status
        if status == "UNAVAILABLE" and (reason := unreachable(self.socket)):
            return CallFailed(reason[0], status=status, hint=reason[1])
        return CallFailed(text, status=status)

    def pods(self) -> list[api_pb2.PodSandbox]:
        """All pods."""
        from tare.cri.v1 import api_pb2

        return list(self.call(self.runtime.ListPodSandbox, api_pb2.ListPodSandboxRequest()).items)

    def containers(self) -> list[api_pb2.Container]:
        """All containers, in any state."""
        from tare.cri.v1 import api_pb2

        return list(self.call(self.runtime.ListContainers, api_pb2.ListContainersRequest()).containers)

    def container_status(self, container_id: str) -> api_pb2.ContainerStatus:
        """One container in full."""
        from tare.cri.v1 import api_pb2

        request = api_pb2.ContainerStatusRequest(container_id=container_id)
        status: api_pb2.ContainerStatus = self.call(self.runtime.ContainerStatus, request).status
        return status


def unreachable(socket: str) -> tuple[str, str] | None:
    """Why nothing can be said to this socket, and what to try; None where it looks well."""
    start = "is the daemon running? start it with  tare serve"
    if not os.path.exists(socket):
        if not os.access(os.path.dirname(socket) or ".", os.X_OK) and os.path.isdir(os.path.dirname(socket)):
            return f"cannot look for Tare's socket at {socket}: permission denied", "the socket is root's: try sudo"
        return f"cannot reach Tare: there is no socket at {socket}", start
    if not os.access(socket, os.W_OK):
        return f"cannot reach Tare at {socket}: permission denied", "the socket is root's: try sudo"
    if not answers(socket):
        return f"cannot reach Tare at {socket}: nobody answers there", start
    return None  # it is the daemon that says it, of a part of its own


def answers(path: str) -> bool:
    """Whether somebody listens at a socket."""
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(CONNECT_SECONDS)
        try:
            connection.connect(path)
        except OSError:
            return False
    return True
