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
from tare.cli.health import RESTART_ANNOTATION, SUPERVISION, next_attempt, supervision_of, supervision_options
from tare.cli.images import PULL_SECONDS, find
from tare.cli.interactive import keys_option
from tare.cli.logs import between, has_ended, write
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
    default="pod",
    show_default=True,
    metavar="pod|host|NAME",
    help="An address of its own on the usual network or on one of the settings, or this machine's network.",
)
@click.option(
    "--runtime", default="", metavar="NAME", help="The runtime handler.  [default: as the daemon's settings say]"
)
@click.option("--hostname", default="", metavar="NAME", help="Its host name.  [default: the container's name]")
@click.option("-l", "--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label for it and its pod.")
@click.option("-i", "--interactive", is_flag=True, help="Pass standard input on.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@keys_option
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
@supervision_options
@click.option(
    "--log-dir", envvar="TARE_LOG_DIR", default=LOG_DIRECTORY, show_default=True, metavar="DIR", help="Where logs go."
)
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def run(
    socket: str,
    /,
    detach: bool,
    remove: bool | None,
    pull: str,
    stop_timeout: int,
    log_dir: str,
    detach_keys: str,
    **options: Any,
) -> int:
    """Run COMMAND (or what the image says) in a new container of IMAGE, and end with its exit code.

    Exit code 125 means that Tare failed. Ctrl-C stops the container; a second one kills it.
    """
    from tare.cli.request import RunOptions

    if options["tty"] and options["interactive"] and not detach and not os.isatty(sys.stdin.fileno()):
        raise InvalidArgument("-it wants a terminal, and standard input is none", hint="leave -t out")
    if detach and remove:
        raise InvalidArgument("--rm and --detach exclude each other", hint="take it away with  tare rm")
    supervised = supervision_of({name: options.pop(name) for name in SUPERVISION})
    restarts = RESTART_ANNOTATION in supervised
    if restarts and remove:
        raise InvalidArgument("--rm and --restart exclude each other")
    token = uuid.uuid4().hex
    directory = os.path.join(os.path.abspath(log_dir), token)
    environment, attached = os.environ, not detach
    wanted = RunOptions(
        token=token,
        log_directory=directory,
        environment=environment,
        annotations=supervised,
        attached=attached,
        **options,
    )
    with Client(socket) as client, Signals() as signals:
        session = Session(client, signals, wanted)
        session.check()
        if not session.ensure_image(pull):
            return signals.exit_code
        keep = detach or restarts or remove is False
        try:
            session.create()
            if not detach and (wanted.interactive or wanted.tty):
                code = session.converse(stop_timeout, detach_keys)
                keep |= code is None
                return code or 0
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


class Stopping:
    """Passes signals on: the first stops the container of a session, those after it kill it."""

    def __init__(self, session: Session, timeout: int) -> None:
        self._session, self._timeout = session, timeout
        self._handled = 0
        self._call: Any = None

    def look(self) -> bool:
        """Do what a signal that has come asks for; whether one has."""
        received = len(self._session.signals.received)
        if received == self._handled:
            return False
        self._call = self._session.stop(0 if self._handled else self._timeout)
        self._handled = received
        return True

    def cancel(self) -> None:
        """The container has ended: no answer is waited for."""
        if self._call is not None:
            self._call.cancel()


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

    def create(self) -> None:
        """Pod and container, not yet started. Raises CallFailed."""
        from tare.cri.v1 import api_pb2

        runtime, call = self.client.runtime, self.client.call
        wanted = api_pb2.RunPodSandboxRequest(config=self._pod, runtime_handler=self.options.runtime)
        self.pod_id = call(runtime.RunPodSandbox, wanted).pod_sandbox_id
        create = api_pb2.CreateContainerRequest(
            pod_sandbox_id=self.pod_id, config=self._container, sandbox_config=self._pod
        )
        self.container_id = call(runtime.CreateContainer, create).container_id
        self.log_path = self.client.container_status(self.container_id).log_path

    def start(self) -> None:
        """The container runs. Raises CallFailed."""
        from tare.cri.v1 import api_pb2

        wanted = api_pb2.StartContainerRequest(container_id=self.container_id)
        self.client.call(self.client.runtime.StartContainer, wanted)

    def converse(self, stop_timeout: int, keys: str) -> int | None:
        """Start it with our own streams joined to it from its first byte on: its exit code, None where the keys were typed that detach.

        Signals stop it (Ctrl-C in a terminal is the container's own). Raises CallFailed, SessionFailed.
        """
        from tare.cli import stream
        from tare.cri.v1 import api_pb2

        stdin, tty = self.options.interactive, self.options.tty
        wanted = api_pb2.AttachRequest(
            container_id=self.container_id, tty=tty, stdin=stdin, stdout=True, stderr=not tty
        )
        url = self.client.call(self.client.runtime.Attach, wanted).url
        stopping = Stopping(self, stop_timeout)
        left = stream.join(
            url, self.client.socket, stdin=stdin, tty=tty, keys=keys, ready=self.start, signalled=stopping.look
        )
        if left is None:
            return None
        pause = FIRST_POLL
        while not has_ended(self.client, self.container_id):  # it may have closed its output and gone on
            stopping.look()
            time.sleep(pause)
            pause = min(pause * 1.5, LAST_POLL)
        stopping.cancel()
        return int(self.client.container_status(self.container_id).exit_code)

    def follow(self, stop_timeout: int) -> int:
        """Copy the log to our streams until the container has ended, for good; returns its exit code. Signals stop it."""
        stopping = Stopping(self, stop_timeout)
        while True:
            code = self._follow(stopping)
            after = self.container_id if RESTART_ANNOTATION in self.options.annotations else ""
            following = next_attempt(self.client, self.pod_id, after, stopping.look) if after else None
            if following is None:
                return code
            before = self.log_path
            self.container_id, self.log_path = following, self.client.container_status(following).log_path
            between(before, self.log_path, crilog.Renderer())

    def _follow(self, stopping: Stopping) -> int:
        """One attempt's."""
        renderer, pause = crilog.Renderer(), FIRST_POLL
        with LogFile(self.log_path) as log:
            while True:
                if stopping.look():
                    pause = FIRST_POLL
                ended = has_ended(self.client, self.container_id)
                moved = write(log.read(), renderer)
                if ended:
                    break
                pause = FIRST_POLL if moved else min(pause * 1.5, LAST_POLL)
                time.sleep(pause)
        stopping.cancel()
        return int(self.client.container_status(self.container_id).exit_code)

    def stop(self, timeout: int) -> Any:
        """Ask for its end, which is not waited for."""
        from tare.cri.v1 import api_pb2

        request = api_pb2.StopContainerRequest(container_id=self.container_id, timeout=timeout)
        return self.client.runtime.StopContainer.future(request, timeout=timeout + CALL_SECONDS)

    def remove(self) -> None:
        """Take away what was made. Raises CallFailed."""
        from tare.cli import removal

        if self.pod_id:
            removal.remove_pod(self.client, self.pod_id, [self.log_path] if self.log_path else [])
