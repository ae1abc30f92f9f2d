"""`tare run`: one container in a pod of its own, followed to its end.

    image here? ─► RunPodSandbox ─► CreateContainer ─► StartContainer ─► log file → our streams ─► StopPodSandbox,
     (pull)                                              SIGINT, SIGTERM → StopContainer             RemovePodSandbox

The log file is the container's output: its pieces are joined again, so that what comes out is what went in (with a newline at
its very end, if the container left that out).
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

import click

from tare.cli import crilog
from tare.cli.client import CALL_SECONDS, Client
from tare.cli.credentials import credentials
from tare.cli.follow import LogFile
from tare.cli.images import PULL_SECONDS, find
from tare.cli.logs import has_ended, write
from tare.cli.signals import Signals
from tare.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from tare.cli.request import RunOptions
    from tare.cri.v1 import api_pb2

LOG_DIRECTORY = "/var/log/tare"
FIRST_POLL, LAST_POLL = 0.002, 0.1


@click.command(context_settings={"allow_interspersed_args": False, "max_content_width": 110})
@click.option("--name", default="", help="A name for the container, its pod and its host.  [default: made up]")
@click.option("-e", "--env", multiple=True, metavar="KEY[=VALUE]", help="Set a variable, or hand on one's own.")
@click.option("-v", "--volume", "volumes", multiple=True, metavar="SRC:DST[:ro]", help="Bind a path of this machine.")
@click.option("-m", "--memory", default="", metavar="SIZE", help="Memory limit: 64m, 1.5g.")
@click.option("--cpus", type=float, default=0.0, metavar="NUMBER", help="CPU limit: 0.5, 2.")
@click.option("-w", "--workdir", default="", metavar="DIR", help="Working directory.")
@click.option("-u", "--user", default="", metavar="NAME|UID[:GID]", help="Who runs it.")
@click.option("--entrypoint", default="", metavar="PATH", help="Instead of the image's entry point.")
@click.option(
    "--network",
    type=click.Choice(["pod", "host"]),
    default="pod",
    show_default=True,
    help="A network of its own, or this machine's.",
)
@click.option(
    "--runtime", default="", metavar="NAME", help="The runtime handler.  [default: as the daemon's settings say]"
)
@click.option("--hostname", default="", metavar="NAME", help="Its host name.  [default: the container's name]")
@click.option("-l", "--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label for it and its pod.")
@click.option("-d", "--detach", is_flag=True, help="Print the container's ID and leave it running.")
@click.option(
    "--rm/--no-rm", "remove", default=None, help="Take it away once it has ended.  [default: unless --detach]"
)
@click.option(
    "--pull",
    type=click.Choice(["missing", "always", "never"]),
    default="missing",
    show_default=True,
    help="When to pull the image.",
)
@click.option("--read-only", is_flag=True, help="Its root file system cannot be written.")
@click.option("--privileged", is_flag=True, help="All rights of this machine's root.")
@click.option("--cap-add", multiple=True, metavar="NAME", help="Grant a capability.")
@click.option("--cap-drop", multiple=True, metavar="NAME", help="Take a capability (ALL: every one).")
@click.option("--stop-timeout", type=click.IntRange(min=0), default=10, show_default=True, help="Seconds until a kill.")
@click.option(
    "--log-dir", envvar="TARE_LOG_DIR", default=LOG_DIRECTORY, show_default=True, metavar="DIR", help="Where logs go."
)
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def run(
    socket: str, /, detach: bool, remove: bool | None, pull: str, stop_timeout: int, log_dir: str, **options: Any
) -> int:
    """Run COMMAND (or what the image says) in a new container of IMAGE, and end with its exit code.

    Exit code 125 means that Tare failed. Ctrl-C stops the container; a second one kills it.
    """
    from tare.cli.request import RunOptions

    if detach and remove:
        raise InvalidArgument("--rm and --detach exclude each other", hint="take it away with  tare rm")
    token = uuid.uuid4().hex
    directory = os.path.join(os.path.abspath(log_dir), token)
    environment, attached = os.environ, not detach
    wanted = RunOptions(token=token, log_directory=directory, environment=environment, attached=attached, **options)
    with Client(socket) as client, Signals() as signals:
        session = Session(client, signals, wanted)
        session.check()
        if not session.ensure_image(pull):
            return signals.exit_code
        keep = detach or remove is False
        try:
            session.start()
            if detach:
                print(session.container_id)
                return 0
            return session.follow(stop_timeout)
        except BaseException:
            keep = False
            raise
        finally:
            if not keep:
                session.remove()


class Session:
    """One run: what it has made so far."""

    def __init__(self, client: Client, signals: Signals, options: RunOptions) -> None:
        self.client = client
        self.signals = signals
        self.options = options
        self.pod_id = ""
        self.container_id = ""
        self.log_path = ""

    def check(self) -> None:
        """Raises InvalidArgument for options that make no request, before anything is made."""
        from tare.cli import request

        self._pod: api_pb2.PodSandboxConfig = request.pod_config(self.options)
        self._container: api_pb2.ContainerConfig = request.container_config(self.options)

    def ensure_image(self, policy: str) -> bool:
        """Pull the image if the policy says so. False where a signal came meanwhile. Raises NotFound, CallFailed."""
        name = self.options.image
        if policy != "always" and find(self.client, name) is not None:
            return True
        if policy == "never":
            raise NotFound(f"there is no image {name} here", hint=f"get it with  tare pull {name}")
        if sys.stderr.isatty():
            sys.stderr.write(f"pulling {name} …\n")
        return self._pull(name)

    def _pull(self, name: str) -> bool:
        import grpc

        from tare.cri.v1 import api_pb2

        request = api_pb2.PullImageRequest(image=api_pb2.ImageSpec(image=name, user_specified_image=name))
        if (known := credentials(name, None)) is not None:
            request.auth.username, request.auth.password = known.username, known.password
            request.auth.identity_token, request.auth.registry_token = known.identity_token, known.registry_token
        call = self.client.images.PullImage.future(request, timeout=PULL_SECONDS)
        while True:
            if self.signals.received:
                call.cancel()
                return False
            try:
                call.result(timeout=LAST_POLL)
                return True
            except grpc.FutureTimeoutError:
                continue
            except grpc.RpcError as error:
                raise self.client.failure(error) from error

    def start(self) -> None:
        """Pod and container, to running. Raises CallFailed."""
        from tare.cri.v1 import api_pb2

        runtime, call = self.client.runtime, self.client.call
        wanted = api_pb2.RunPodSandboxRequest(config=self._pod, runtime_handler=self.options.runtime)
        self.pod_id = call(runtime.RunPodSandbox, wanted).pod_sandbox_id
        create = api_pb2.CreateContainerRequest(
            pod_sandbox_id=self.pod_id, config=self._container, sandbox_config=self._pod
        )
        self.container_id = call(runtime.CreateContainer, create).container_id
        self.log_path = self.client.container_status(self.container_id).log_path
        call(runtime.StartContainer, api_pb2.StartContainerRequest(container_id=self.container_id))

    def follow(self, stop_timeout: int) -> int:
        """Copy the log to our streams until the container has ended; returns its exit code. Signals stop it."""
        renderer = crilog.Renderer()
        handled, pause, stopping = 0, FIRST_POLL, None
        with LogFile(self.log_path) as log:
            while True:
                if len(self.signals.received) > handled:
                    handled = len(self.signals.received)
                    stopping = self._stop(stop_timeout if handled == 1 else 0)
                    pause = FIRST_POLL
                ended = has_ended(self.client, self.container_id)
                moved = write(log.read(), renderer)
                if ended:
                    break
                pause = FIRST_POLL if moved else min(pause * 1.5, LAST_POLL)
                time.sleep(pause)
        if stopping is not None:
            stopping.cancel()
        return int(self.client.container_status(self.container_id).exit_code)

    def _stop(self, timeout: int) -> Any:
        from tare.cri.v1 import api_pb2

        request = api_pb2.StopContainerRequest(container_id=self.container_id, timeout=timeout)
        return self.client.runtime.StopContainer.future(request, timeout=timeout + CALL_SECONDS)

    def remove(self) -> None:
        """Take away what was made. Raises CallFailed."""
        from tare.cli import removal

        if self.pod_id:
            removal.remove_pod(self.client, self.pod_id, [self.log_path] if self.log_path else [])
