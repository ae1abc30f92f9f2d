"""Both CRI services on a unix socket that only root can reach.

The socket appears at its path at once and with its final permissions: it is bound in a directory beside it that nobody else
can enter, and renamed. A socket that an earlier daemon left is replaced; one that somebody listens on is not.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor

from tare.cri.dispatch import Lasting, Service, Watch, generic_handler
from tare.cri.image_service import ImageService
from tare.cri.ports import ImagePort, RuntimePort, Urls
from tare.cri.runtime_service import RuntimeService
from tare.cri.v1 import api_pb2 as pb
from tare.errors import AlreadyExists, FailedPrecondition, InternalError, InvalidArgument

# A kubelet sends and takes 16 MiB. More than that, so that its own limit is the one that is met.
MAX_MESSAGE: Final = 32 << 20
# sun_path of unix(7), with its final NUL.
MAX_SOCKET_PATH: Final = 107
SOCKET_MODE: Final = 0o600


class Server:
    """The gRPC server; `start` returns when calls are taken.

    `about` is told by a verbose Status; `others` are served beside CRI's services; `urls` lead to streams; `watch` is told of all calls.
    """

    def __init__(
        self,
        path: Path,
        runtime: RuntimePort,
        images: ImagePort,
        about: Mapping[str, object] | None = None,
        others: Sequence[tuple[ServiceDescriptor, Service]] = (),
        urls: Urls | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._path = path
        self._inode = 0
        self._lasting = Lasting()
        self._server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)]
        )
        services = pb.DESCRIPTOR.services_by_name
        ours: list[tuple[ServiceDescriptor, Service]] = [
            (services["RuntimeService"], RuntimeService(runtime, about or {}, urls)),
            (services["ImageService"], ImageService(images)),
            *others,
        ]
        handlers = (generic_handler(descriptor, service, self._lasting, watch) for descriptor, service in ours)
        self._server.add_generic_rpc_handlers(tuple(handlers))

    @property
    def lasting(self) -> Lasting:
        """Calls that go on when their caller leaves."""
        return self._lasting

    async def start(self) -> None:
        """Listen. Raises AlreadyExists where another process does, InvalidArgument for a path that no socket can have."""
        make_way(self._path)
        self._inode = bind(self._server, self._path)
        await self._server.start()

    async def wait(self) -> None:
        """Until the server is stopped."""
        await self._server.wait_for_termination()

    async def stop(self, grace: float) -> None:
        """Take no more calls, give those under way `grace` seconds, and as much again to work whose caller has left."""
        if self._inode and inode(self._path) == self._inode:
            self._path.unlink()
        await self._server.stop(grace)
        await self._lasting.drain(grace)


def inode(path: Path) -> int:
    """The inode at `path` itself, 0 where nothing is."""
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return 0


def make_way(path: Path) -> None:
    """Make the socket's directory (root only) if there is none, and see that nobody listens at `path`.

    Raises AlreadyExists where somebody does, FailedPrecondition where something else than a socket is there, InvalidArgument
    for a path that no socket can have.
    """
    doing = f"listen on {path}"
    if len(os.fsencode(newborn(path))) > MAX_SOCKET_PATH:
        raise InvalidArgument(
            doing, cause="the path is too long for a unix socket", hint="choose a shorter --socket or --run"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise InternalError(doing, cause=error) from error
    if not stat.S_ISSOCK(mode):
        raise FailedPrecondition(
            doing, cause="there is something that is not a socket", hint="move it away, or choose --socket"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(str(path))
    # A socket whose process is gone refuses; one whose queue is full says EAGAIN, and has a process.
    if code not in (errno.ECONNREFUSED, errno.ENOENT):
        raise AlreadyExists(
            doing, cause="another process listens there", hint="stop it, or choose --root, --run and --socket"
        )


def newborn(path: Path) -> Path:
    """Where the socket that is to be at `path` is bound."""
    return path.parent / f".{path.name}.new" / "s"


def bind(server: grpc.aio.Server, path: Path) -> int:
    """Bind the server's socket and move it to `path`; returns its inode."""
    birth = newborn(path)
    try:
        clear(birth)
        birth.parent.mkdir(mode=0o700)
        server.add_insecure_port(f"unix:{birth}")
        birth.chmod(SOCKET_MODE)
        number = inode(birth)
        birth.rename(path)
        birth.parent.rmdir()
    except (OSError, RuntimeError) as error:
        raise InternalError(f"listen on {path}", cause=error) from error
    return number


def clear(birth: Path) -> None:
    """Remove what a daemon left that died while it bound its socket."""
    birth.unlink(missing_ok=True)
    if os.path.lexists(birth.parent):
        birth.parent.rmdir()
