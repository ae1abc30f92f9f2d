"""`./dev demo`: what Tare does, shown on this machine and told to someone who has never seen it.

It starts a registry with two images made from Debian packages, starts the daemon with directories of its own, and does through
CRI what a kubelet would do. Whatever happens, Ctrl-C too, nothing of it is left behind; at its end it looks, and says so.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from scripts import demo_images
from tare.cli import crilog
from tare.cli.client import CallFailed, Client
from tare.cli.output import size
from tare.cli.request import MASKED_PATHS, READONLY_PATHS
from tare.cri.v1 import api_pb2
from tare.network.bridge import pod_link_name
from tare.network.subnets import bridge_name
from tests.support import leaks
from tests.support.daemon import Daemon
from tests.support.registry import serving

WAIT_SECONDS = 20.0
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
READER = (
    "trap 'exit 0' TERM; until page=$(wget -q -O - http://127.0.0.1/); do sleep 0.1; done;"
    ' echo "localhost says: $page"; sleep 3600 & wait'
)
GREEDY = "echo 'taking 256 MB'; exec dd if=/dev/zero of=/dev/null bs=256M count=1"


def heading(number: int, text: str) -> None:
    """Begin a chapter."""
    print(f"\n{number}. {text}\n", flush=True)


def say(text: str) -> None:
    """Tell."""
    print(f"   {text}", flush=True)


def show(text: str) -> None:
    """What somebody else wrote."""
    for line in text.rstrip("\n").split("\n"):
        print(f"      | {line}", flush=True)


@contextlib.contextmanager
def timed(text: str) -> Iterator[None]:
    """Tell what was done and how long it took."""
    begin = time.perf_counter()
    yield
    say(f"{text}  [{(time.perf_counter() - begin) * 1000:.0f} ms]")


class Demo:
    """The story's second half: what is done through CRI. `registry` is host:port; `names` gets what things are called by."""

    def __init__(self, client: Client, registry: str, logs: Path, names: list[str]) -> None:
        self.client = client
        self.registry = registry
        self.logs = logs
        self.names = names

    def pull(self) -> None:
        """Both images."""
        for name in (demo_images.BUSYBOX, demo_images.NGINX):
            spec = api_pb2.ImageSpec(image=f"{self.registry}/{name}")
            with timed(f"PullImage {name}"):
                self.client.call(self.client.images.PullImage, api_pb2.PullImageRequest(image=spec))
            image = self.client.call(self.client.images.ImageStatus, api_pb2.ImageStatusRequest(image=spec)).image
            say(f"   {image.id[:19]}…, {size(image.size)} compressed")

    def run_pod(self, name: str) -> tuple[str, api_pb2.PodSandboxConfig, str]:
        """A pod: its ID, its configuration, its address."""
        namespaces = api_pb2.NamespaceOption(pid=api_pb2.CONTAINER)
        security = api_pb2.LinuxSandboxSecurityContext(namespace_options=namespaces)
        config = api_pb2.PodSandboxConfig(
            metadata=api_pb2.PodSandboxMetadata(name=name, uid=name, namespace="demo"),
            hostname=name,
            log_directory=str(self.logs / name),
            linux=api_pb2.LinuxPodSandboxConfig(security_context=security),
        )
        runtime = self.client.runtime
        with timed(f"RunPodSandbox {name}"):
            pod = self.client.call(runtime.RunPodSandbox, api_pb2.RunPodSandboxRequest(config=config)).pod_sandbox_id
        self.names += [pod, pod_link_name(pod)]
        status = self.client.call(runtime.PodSandboxStatus, api_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
        return pod, config, status.network.ip

    def run_container(
        self,
        pod: tuple[str, api_pb2.PodSandboxConfig, str],
        name: str,
        image: str,
        command: tuple[str, ...] = (),
        memory: int = 0,
    ) -> str:
        """A container in that pod, started: its ID. `memory` is its limit in bytes."""
        namespaces = api_pb2.NamespaceOption(pid=api_pb2.CONTAINER)
        security = api_pb2.LinuxContainerSecurityContext(
            namespace_options=namespaces, masked_paths=MASKED_PATHS, readonly_paths=READONLY_PATHS
        )
        limits = api_pb2.LinuxContainerResources(memory_limit_in_bytes=memory)
        config = api_pb2.ContainerConfig(
            metadata=api_pb2.ContainerMetadata(name=name),
            image=api_pb2.ImageSpec(image=f"{self.registry}/{image}"),
            command=command,
            log_path=f"{name}.log",
            linux=api_pb2.LinuxContainerConfig(security_context=security, resources=limits),
        )
        pod_id, pod_config, _ = pod
        request = api_pb2.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=pod_config)
        with timed(f"CreateContainer, StartContainer {name}"):
            container = self.client.call(self.client.runtime.CreateContainer, request).container_id
            start = api_pb2.StartContainerRequest(container_id=container)
            self.client.call(self.client.runtime.StartContainer, start)
        return str(container)

    def log(self, container: str) -> str:
        """What a container wrote so far."""
        path = Path(self.client.container_status(container).log_path)
        renderer = crilog.Renderer()
        lines = path.read_bytes().splitlines() if path.exists() else []
        return b"".join(renderer.render(crilog.parse(line)) for line in lines).decode(errors="replace")

    def wait(self, what: str, happened: Callable[[], bool]) -> None:
        """Until something has happened. Raises RuntimeError, with `what`, when it takes too long."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not happened():
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {WAIT_SECONDS:.0f} s in vain: {what}")
            time.sleep(0.02)

    def wait_exited(self, container: str) -> api_pb2.ContainerStatus:
        """A container's status once it has ended."""
        exited = api_pb2.CONTAINER_EXITED
        self.wait("the container should end", lambda: self.client.container_status(container).state == exited)
        return self.client.container_status(container)

    def localhost(self) -> tuple[tuple[str, api_pb2.PodSandboxConfig, str], str, str]:
        """Two containers that share a pod; returns the pod and the IDs of web server and reader."""
        heading(3, "A pod of two containers that talk over localhost")
        pod = self.run_pod("shop")
        say(f"The pod has its own network namespace and the address {pod[2]}.")
        web = self.run_container(pod, "web", demo_images.NGINX)
        reader = self.run_container(pod, "reader", demo_images.BUSYBOX, ("sh", "-c", READER))
        self.wait("the reader should print the page", lambda: "localhost says" in self.log(reader))
        say("The containers of a pod share its network, so the reader finds nginx at 127.0.0.1. Its log:")
        show(self.log(reader))
        return pod, web, reader

    def by_address(self, address: str) -> tuple[str, api_pb2.PodSandboxConfig, str]:
        """A second pod that reaches the first."""
        heading(4, "A second pod that reaches the first by its IP")
        pod = self.run_pod("visitor")
        command = ("wget", "-q", "-O", "-", f"http://{address}/")
        visitor = self.run_container(pod, "visitor", demo_images.BUSYBOX, command)
        status = self.wait_exited(visitor)
        say(
            f"{pod[2]} asked {address} over Tare's own bridge (no CNI plugin). Exit code {status.exit_code}, and its log:"
        )
        show(self.log(visitor))
        return pod

    def memory_limit(self, pod: tuple[str, api_pb2.PodSandboxConfig, str]) -> None:
        """A container that takes more than it may."""
        heading(5, "A memory limit that holds")
        say("A container that may use 32 MB asks for 256 MB.")
        greedy = self.run_container(pod, "greedy", demo_images.BUSYBOX, ("sh", "-c", GREEDY), memory=32 << 20)
        status = self.wait_exited(greedy)
        say("The kernel ended it within its cgroup; the others did not notice. ContainerStatus says:")
        show(f"exit code {status.exit_code}, reason {status.reason}")
        if status.reason != "OOMKilled":
            raise RuntimeError(f"the memory limit did not hold: {status.reason}, {status.message}")

    def execute(self, reader: str) -> None:
        """A command inside."""
        heading(6, "A command inside a running container")
        request = api_pb2.ExecSyncRequest(container_id=reader, cmd=["ps", "-o", "pid,args"], timeout=10)
        with timed("ExecSync ps"):
            answer = self.client.call(self.client.runtime.ExecSync, request)
        say("It sees its own processes only, in a PID namespace where the container's first process is 1:")
        show("\n".join(line[:90] for line in answer.stdout.decode().splitlines() if line.strip()))

    def logs_of(self, web: str) -> None:
        """What nginx noted."""
        heading(7, "Logs, in the format that kubectl logs reads")
        path = Path(self.client.container_status(web).log_path)
        self.wait("nginx should note two requests", lambda: self.log(web).count("asked for") >= 2)
        say("nginx wrote one line for each request to its standard output; the log file holds:")
        show(path.read_text())

    def take_down(self) -> None:
        """Pods and images."""
        for pod in self.client.pods():
            with timed(f"StopPodSandbox, RemovePodSandbox {pod.metadata.name}"):
                stop = api_pb2.StopPodSandboxRequest(pod_sandbox_id=pod.id)
                self.client.call(self.client.runtime.StopPodSandbox, stop)
                remove = api_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod.id)
                self.client.call(self.client.runtime.RemovePodSandbox, remove)
        for name in (demo_images.BUSYBOX, demo_images.NGINX):
            spec = api_pb2.ImageSpec(image=f"{self.registry}/{name}")
            self.client.call(self.client.images.RemoveImage, api_pb2.RemoveImageRequest(image=spec))
        say("RemoveImage, both")


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A directory for everything, and the machine's forwarding put back as it was."""
    forwarding = FORWARDING.read_text()
    base = Path(tempfile.mkdtemp(prefix="tare-demo-", dir="/var/lib"))
    try:
        yield base
    finally:
        shutil.rmtree(base)
        FORWARDING.write_text(forwarding)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """What is done once the body has ended, however it ended, is not interrupted a second time."""
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def tell(base: Path, names: list[str]) -> None:
    """The whole story. `names` gets what its things are called by."""
    with contextlib.ExitStack() as stack:
        heading(1, "Two images, made from Debian packages, in a registry")
        layouts = demo_images.make(base / "layouts")
        registry = stack.enter_context(serving(base / "registry", layouts)).url
        say(f"Debian's docker-registry serves them on {registry}:")
        say(f"{demo_images.BUSYBOX} (a shell and its tools) and {demo_images.NGINX} (a web server on top of that).")

        heading(2, "A daemon that serves CRI, and a pull")
        with timed("tare serve"):
            daemon = stack.enter_context(Daemon(base / "tare"))
        names.append(bridge_name("", daemon.run))
        stack.enter_context(undisturbed())
        say("It speaks CRI, as containerd and CRI-O do, on a unix socket that is root's alone.")
        demo = Demo(daemon.client, registry, base / "logs", names)
        demo.pull()
        say("The images share their first layer, which was fetched and unpacked once. Every digest was verified.")

        shop, web, reader = demo.localhost()
        visitor = demo.by_address(shop[2])
        demo.memory_limit(visitor)
        demo.execute(reader)
        demo.logs_of(web)
        heading(8, "All of it taken down")
        demo.take_down()


def interrupted(number: int, frame: object) -> NoReturn:
    """SIGTERM and SIGHUP end the story as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> int:
    """Tell it, then look whether anything is left."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    print("Tare is a container runtime: it pulls images, makes pods and containers of them, and cleans up after them.")
    before = leaks.snapshot("demo")
    code = 0
    names: list[str] = []
    try:
        with workplace() as base:
            names.append(base.name)
            tell(base, names)
    except KeyboardInterrupt:
        print("\ninterrupted: what was made is taken down", flush=True)
        code = 130
    except (RuntimeError, CallFailed) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr, flush=True)
        code = 1
    left = [thing for thing in leaks.settle(before, "demo", 5) if any(name in thing.name for name in names)]
    if left:
        print("\nLeft behind:", *left, sep="\n   ", file=sys.stderr)
        return code or 1
    print("\nNothing is left: no mount, namespace, link, cgroup, process, firewall table or file of all this.")
    return code


if __name__ == "__main__":
    sys.exit(main())
