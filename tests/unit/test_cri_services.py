"""Both CRI services through a real gRPC channel on a unix socket, on ports kept in memory."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tare import __version__
from tare.cri.image_service import ImageService
from tare.cri.runtime_service import RuntimeService
from tare.cri.stream_service import StreamService
from tare.cri.v1 import api_pb2 as pb
from tare.errors import NotFound, ResourceExhausted, TareError, Unavailable, UnknownError
from tests.support.cri_ports import Client, MemoryImages, MemoryRuntime, serving

UNKNOWN_ID = "f" * 64


def run(
    tmp_path: Path,
    scenario: Callable[[Client, MemoryRuntime, MemoryImages], Awaitable[None]],
) -> None:
    """Play a scenario against a server in `tmp_path`."""

    async def play() -> None:
        runtime, images = MemoryRuntime(), MemoryImages()
        async with serving(tmp_path / "tare.sock", runtime, images) as client:
            await asyncio.wait_for(scenario(client, runtime, images), 30)

    asyncio.run(play())


async def failing(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    """The status that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def pod(name: str = "web", **labels: str) -> pb.RunPodSandboxRequest:
    """A request for a pod."""
    config = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name=name, uid="u", namespace="default"),
        labels=labels,
        annotations={"a": "b\u00e9"},
    )
    return pb.RunPodSandboxRequest(config=config, runtime_handler="builtin")


def container(pod_id: str, name: str = "app", **labels: str) -> pb.CreateContainerRequest:
    """A request for a container."""
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=name), image=pb.ImageSpec(image="busybox"), labels=labels
    )
    return pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=pod().config)


def test_version_status_and_runtime_config(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        assert await client.runtime.Version(pb.VersionRequest(version="0.1.0")) == pb.VersionResponse(
            version="0.1.0", runtime_name="tare", runtime_version=__version__, runtime_api_version="v1"
        )
        status = await client.runtime.Status(pb.StatusRequest(verbose=True))
        network = pb.RuntimeCondition(type="NetworkReady", status=False, reason="NetworkNotReady", message="no bridge")
        assert list(status.status.conditions) == [pb.RuntimeCondition(type="RuntimeReady", status=True), network]
        assert [handler.name for handler in status.runtime_handlers] == ["", "builtin", "runc"]
        assert status.runtime_handlers[0].features == status.runtime_handlers[1].features
        assert status.runtime_handlers[0].features.recursive_read_only_mounts
        assert status.runtime_handlers[2].features == pb.RuntimeHandlerFeatures(user_namespaces=True)
        assert status.features == pb.RuntimeFeatures(supplemental_groups_policy=True)
        info = json.loads(status.info["info"])
        assert info == {
            "version": __version__,
            "cgroupDriver": "cgroupfs",
            "config": {"root": "/var/lib/tare"},
            "unsupported": {"userNamespaces": "no room"},
        }
        assert not (await client.runtime.Status(pb.StatusRequest())).info
        for runtime.driver, driver in (("cgroupfs", pb.CGROUPFS), ("systemd", pb.SYSTEMD)):
            assert (await client.runtime.RuntimeConfig(pb.RuntimeConfigRequest())).linux.cgroup_driver == driver

    run(tmp_path, scenario)


def test_pod_from_run_to_remove(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        pod_id = (await client.runtime.RunPodSandbox(pod(tier="front"))).pod_sandbox_id
        await client.runtime.CreateContainer(container(pod_id))
        reply = await client.runtime.PodSandboxStatus(
            pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id[:8], verbose=True)
        )
        assert (reply.status.id, reply.status.state, reply.status.network.ip) == (pod_id, pb.SANDBOX_READY, "10.0.0.2")
        assert dict(reply.status.annotations) == {"a": "b\u00e9"}
        assert [item.metadata.name for item in reply.containers_statuses] == ["app"]
        assert reply.timestamp > 0
        assert json.loads(reply.info["info"]) == {"netns": "/run/netns/x", "id": pod_id}
        for _ in range(2):
            await client.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod_id))
        assert (await client.runtime.ListPodSandbox(pb.ListPodSandboxRequest())).items[0].state == pb.SANDBOX_NOTREADY
        for _ in range(2):
            await client.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id))
        assert not (await client.runtime.ListPodSandbox(pb.ListPodSandboxRequest())).items

    run(tmp_path, scenario)


def test_container_from_create_to_remove(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        pod_id = (await client.runtime.RunPodSandbox(pod())).pod_sandbox_id
        container_id = (await client.runtime.CreateContainer(container(pod_id))).container_id
        start = pb.StartContainerRequest(container_id=container_id)
        await client.runtime.StartContainer(start)
        code, message = await failing(client.runtime.StartContainer(start))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert message == f"start container {container_id}: it is RUNNING"
        request = pb.ContainerStatusRequest(container_id=container_id[:4], verbose=True)
        reply = await client.runtime.ContainerStatus(request)
        assert (reply.status.id, reply.status.state) == (container_id, pb.CONTAINER_RUNNING)
        assert json.loads(reply.info["info"]) == {"pid": 42, "id": container_id}
        result = await client.runtime.ExecSync(
            pb.ExecSyncRequest(container_id=container_id, cmd=["ls", "-l"], timeout=5)
        )
        assert result == pb.ExecSyncResponse(stdout=b"\xffls", exit_code=3)
        await client.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container_id))
        await client.runtime.StopContainer(pb.StopContainerRequest(container_id=container_id, timeout=10))
        await client.runtime.StopContainer(pb.StopContainerRequest(container_id=container_id, timeout=-10))
        await client.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container_id))
        assert not (await client.runtime.ListContainers(pb.ListContainersRequest())).containers
        assert runtime.calls[1:] == [
            ("exec_sync", container_id, ("ls", "-l"), 5.0),
            ("reopen_log", container_id),
            ("stop_container", container_id, 10.0),
            ("stop_container", container_id, 0.0),
        ]

    run(tmp_path, scenario)


def test_pod_configuration_left_out_is_the_one_of_the_pod(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        pod_id = (await client.runtime.RunPodSandbox(pod("other"))).pod_sandbox_id
        request = container(pod_id)
        request.ClearField("sandbox_config")
        await client.runtime.CreateContainer(request)
        assert runtime.calls == [("create_container", pod_id, runtime.pods[pod_id].config)]
        request.pod_sandbox_id = UNKNOWN_ID
        assert (await failing(client.runtime.CreateContainer(request)))[0] is grpc.StatusCode.NOT_FOUND

    run(tmp_path, scenario)


def test_filters_hold_together(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        one = (await client.runtime.RunPodSandbox(pod("one", tier="front"))).pod_sandbox_id
        two = (await client.runtime.RunPodSandbox(pod("two", tier="front", zone="a"))).pod_sandbox_id
        await client.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=two))
        ready = pb.PodSandboxStateValue(state=pb.SANDBOX_READY)

        async def pods(**wanted: Any) -> list[str]:
            request = pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(**wanted))
            return [item.id for item in (await client.runtime.ListPodSandbox(request)).items]

        assert await pods() == [one, two]
        assert await pods(id=one) == await pods(id=one[:5]) == await pods(state=ready) == [one]
        assert await pods(label_selector={"tier": "front"}) == [one, two]
        assert await pods(label_selector={"tier": "front", "zone": "a"}) == [two]
        assert await pods(state=ready, label_selector={"zone": "a"}) == await pods(id=UNKNOWN_ID) == []
        assert await pods(id="0") == [], "a prefix that fits both means neither"

        first = (await client.runtime.CreateContainer(container(one, "a", app="x"))).container_id
        second = (await client.runtime.CreateContainer(container(two, "b", app="x"))).container_id
        await client.runtime.StartContainer(pb.StartContainerRequest(container_id=second))
        running = pb.ContainerStateValue(state=pb.CONTAINER_RUNNING)

        async def containers(**wanted: Any) -> list[str]:
            request = pb.ListContainersRequest(filter=pb.ContainerFilter(**wanted))
            return [item.id for item in (await client.runtime.ListContainers(request)).containers]

        assert await containers() == await containers(label_selector={"app": "x"}) == [first, second]
        assert await containers(id=first[:3]) == await containers(pod_sandbox_id=one[:3]) == [first]
        assert await containers(state=running, pod_sandbox_id=two) == [second]
        assert await containers(state=running, pod_sandbox_id=one) == await containers(id=first, state=running) == []
        assert await containers(pod_sandbox_id=UNKNOWN_ID) == []
        for request, call in (
            (pb.ListContainersRequest(filter={"state": {"state": 9}}), client.runtime.ListContainers),
            (pb.ListPodSandboxRequest(filter={"state": {"state": 9}}), client.runtime.ListPodSandbox),
        ):
            assert (await failing(call(request)))[0] is grpc.StatusCode.INVALID_ARGUMENT

    run(tmp_path, scenario)


def test_unknown_ids(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        by_pod, by_container = {"pod_sandbox_id": UNKNOWN_ID}, {"container_id": UNKNOWN_ID}
        await client.runtime.StopPodSandbox(pb.StopPodSandboxRequest(**by_pod))
        await client.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(**by_pod))
        await client.runtime.StopContainer(pb.StopContainerRequest(container_id=UNKNOWN_ID))
        await client.runtime.RemoveContainer(pb.RemoveContainerRequest(**by_container))
        for call in (
            client.runtime.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=UNKNOWN_ID)),
            client.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id=UNKNOWN_ID)),
            client.runtime.StartContainer(pb.StartContainerRequest(**by_container)),
            client.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(**by_container)),
            client.runtime.CreateContainer(container(UNKNOWN_ID)),
        ):
            assert (await failing(call))[0] is grpc.StatusCode.NOT_FOUND

    run(tmp_path, scenario)


def test_what_is_wrong_in_itself_never_reaches_the_runtime(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        calls = [
            (client.runtime.RunPodSandbox(pb.RunPodSandboxRequest()), "config"),
            (client.runtime.StopPodSandbox(pb.StopPodSandboxRequest()), "pod_sandbox_id"),
            (client.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest()), "pod_sandbox_id"),
            (client.runtime.PodSandboxStatus(pb.PodSandboxStatusRequest()), "pod_sandbox_id"),
            (client.runtime.CreateContainer(container("")), "pod_sandbox_id"),
            (client.runtime.CreateContainer(pb.CreateContainerRequest(pod_sandbox_id="0")), "config.metadata"),
            (client.runtime.StartContainer(pb.StartContainerRequest()), "container_id"),
            (client.runtime.StopContainer(pb.StopContainerRequest()), "container_id"),
            (client.runtime.ExecSync(pb.ExecSyncRequest(container_id="0", cmd=["ls"], timeout=-1)), "timeout"),
            (client.runtime.RemoveContainer(pb.RemoveContainerRequest()), "container_id"),
            (client.runtime.ContainerStatus(pb.ContainerStatusRequest()), "container_id"),
            (client.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest()), "container_id"),
            (client.runtime.ExecSync(pb.ExecSyncRequest(cmd=["ls"])), "container_id"),
            (client.runtime.ExecSync(pb.ExecSyncRequest(container_id="0")), "cmd"),
            (client.images.ImageStatus(pb.ImageStatusRequest()), "image.image"),
            (client.images.PullImage(pb.PullImageRequest()), "image.image"),
            (client.images.RemoveImage(pb.RemoveImageRequest()), "image.image"),
        ]
        for call, field in calls:
            code, message = await failing(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert message.startswith(f"check {field}: ")
        assert not runtime.calls

    run(tmp_path, scenario)


def test_images_from_pull_to_remove(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        spec = pb.ImageSpec(image="busybox:latest")
        assert not (await client.images.ImageStatus(pb.ImageStatusRequest(image=spec))).HasField("image")
        request = pb.PullImageRequest(image=spec, auth=pb.AuthConfig(username="u", password="p"))
        image_ref = (await client.images.PullImage(request)).image_ref
        assert images.auth is not None
        assert images.auth.username == "u"
        status = await client.images.ImageStatus(pb.ImageStatusRequest(image=spec, verbose=True))
        assert status.image.id == image_ref
        assert "imageSpec" in json.loads(status.info["info"])

        async def listed(name: str) -> list[str]:
            image_filter = pb.ImageFilter(image=pb.ImageSpec(image=name))
            reply = await client.images.ListImages(pb.ListImagesRequest(filter=image_filter))
            return [item.id for item in reply.images]

        assert await listed("") == await listed("busybox:latest") == await listed(image_ref) == [image_ref]
        assert await listed("other") == []
        usage = await client.images.ImageFsInfo(pb.ImageFsInfoRequest())
        streamed = [
            image.id async for part in client.images.StreamImages(pb.StreamImagesRequest()) for image in part.images
        ]
        assert streamed == [image_ref]
        (filesystem,), (written,) = usage.image_filesystems, usage.container_filesystems
        assert filesystem.fs_id.mountpoint == written.fs_id.mountpoint == "/var/lib/tare"
        assert (filesystem.used_bytes.value, filesystem.inodes_used.value) == (4096, 3)
        assert (written.used_bytes.value, written.inodes_used.value) == (8192, 3)
        for _ in range(2):
            await client.images.RemoveImage(pb.RemoveImageRequest(image=spec))
        assert await listed("") == []

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "failure",
    [
        NotFound("pull image x", step="resolve", cause="404"),
        Unavailable("RegistryUnavailable: pull image x", cause="no route", hint="try again"),
        ResourceExhausted("pull image x", cause="disk full"),
        UnknownError("SignatureValidationFailed: x"),
    ],
)
def test_failed_pulls_are_unknown_in_their_own_words(tmp_path: Path, failure: TareError) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        images.failure = failure
        call = client.images.PullImage(pb.PullImageRequest(image=pb.ImageSpec(image="x")))
        assert await failing(call) == (grpc.StatusCode.UNKNOWN, str(failure))

    run(tmp_path, scenario)


def test_malformed_reference_is_an_invalid_argument(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        spec = pb.ImageSpec(image="Busybox")
        for call in (
            client.images.ImageStatus(pb.ImageStatusRequest(image=spec)),
            client.images.RemoveImage(pb.RemoveImageRequest(image=spec)),
        ):
            code, message = await failing(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "Busybox" in message

    run(tmp_path, scenario)


METHODS = [method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods]


def test_every_method_is_implemented() -> None:
    implemented = {name for kind in (RuntimeService, ImageService) for name in dir(kind) if name[0].isupper()}
    assert len(METHODS) == 43
    assert {method.name for method in METHODS} == implemented


def test_a_method_that_is_not_there_is_unimplemented_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(RuntimeService, "CheckpointPod")
    monkeypatch.delattr(StreamService, "GetContainerEvents")

    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        for name, call in (
            ("CheckpointPod", client.runtime.CheckpointPod(pb.CheckpointPodRequest())),
            ("GetContainerEvents", client.runtime.GetContainerEvents(pb.GetEventsRequest()).read()),
        ):
            code, message = await failing(call)
            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert message == f"{name} is not implemented by tare {__version__}"

    run(tmp_path, scenario)


def test_checkpoints_are_asked_for_with_what_was_sent(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        request = pb.CheckpointContainerRequest(container_id="c", location="/a/b.tar", timeout=7)
        await client.runtime.CheckpointContainer(request)
        options = {"x": "y"}
        await client.runtime.CheckpointPod(
            pb.CheckpointPodRequest(pod_sandbox_id="p", output_path="/a/d", container_ids=["c"], options=options)
        )
        assert runtime.calls[-2:] == [
            ("checkpoint_container", "c", "/a/b.tar", 7.0),
            ("checkpoint_pod", "p", "/a/d", ("c",), options),
        ]
        config = pb.ContainerConfig(metadata=pb.ContainerMetadata(name="main"))
        answer = await client.runtime.RestorePod(
            pb.RestorePodRequest(checkpoint_path="/a/d", container_configs=[config])
        )
        assert (answer.pod_sandbox_id, answer.restored_containers[0].container_id) == ("restored", "main-id")
        name, location, pod_config, handler, containers, _ = runtime.calls[-1]
        assert (name, location, pod_config, handler) == ("restore_pod", "/a/d", None, "")
        assert [item.metadata.name for item in containers] == ["main"]

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.CheckpointContainerRequest(location="/x"), "container_id"),
        (pb.CheckpointContainerRequest(container_id="c"), "location"),
        (pb.CheckpointContainerRequest(container_id="c", location="x"), "location"),
        (pb.CheckpointContainerRequest(container_id="c", location="/x", timeout=-1), "timeout"),
        (pb.CheckpointPodRequest(pod_sandbox_id="p", output_path="x"), "output_path"),
        (pb.CheckpointPodRequest(pod_sandbox_id="p", output_path="/x", container_ids=[""]), "container_ids"),
        (pb.RestorePodRequest(), "checkpoint_path"),
        (pb.RestorePodRequest(checkpoint_path="/x", container_configs=[pb.ContainerConfig()]), "config.metadata"),
        (
            pb.RestorePodRequest(
                checkpoint_path="/x",
                container_configs=[pb.ContainerConfig(metadata=pb.ContainerMetadata(name="a"))] * 2,
            ),
            "twice",
        ),
    ],
)
def test_wrong_requests_about_checkpoints_are_refused(tmp_path: Path, request_: Any, words: str) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        method = type(request_).__name__.removesuffix("Request")
        code, message = await failing(getattr(client.runtime, method)(request_))
        assert code is grpc.StatusCode.INVALID_ARGUMENT and words in message
        assert runtime.calls == []

    run(tmp_path, scenario)


def test_defect_is_internal_in_one_line_and_logged_in_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        runtime.fault = ValueError("first line\nsecond line")
        code, message = await failing(client.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id="0")))
        assert code is grpc.StatusCode.INTERNAL
        assert message == "ContainerStatus: unexpected error: ValueError: first line second line"

    with caplog.at_level(logging.ERROR, "tare.cri"):
        run(tmp_path, scenario)
    (entry,) = caplog.records
    assert entry.exc_info is not None
    assert entry.exc_info[0] is ValueError


def test_wait_given_up_inside_is_unavailable(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        runtime.fault = asyncio.CancelledError()
        code, message = await failing(client.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id="0")))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert message == "ContainerStatus: it was given up while the daemon is stopping (try again)"

    run(tmp_path, scenario)


@pytest.mark.parametrize("method", ["StopPodSandbox", "StartContainer"])
def test_lasting_call_goes_on_when_its_caller_leaves(tmp_path: Path, method: str) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        pod_id = (await client.runtime.RunPodSandbox(pod())).pod_sandbox_id
        container_id = (await client.runtime.CreateContainer(container(pod_id))).container_id
        for event in (runtime.gate, runtime.entered, runtime.finished):
            event.clear()
        if method == "StopPodSandbox":
            call = client.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod_id))
        else:
            call = client.runtime.StartContainer(pb.StartContainerRequest(container_id=container_id))
        await runtime.entered.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await client.runtime.Version(pb.VersionRequest())
        runtime.gate.set()
        await runtime.finished.wait()
        assert not runtime.cancelled.is_set()

    run(tmp_path, scenario)


@pytest.mark.parametrize("method", ["RunPodSandbox", "ExecSync"])
def test_runtime_learns_that_the_caller_left(tmp_path: Path, method: str) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        runtime.gate.clear()
        if method == "RunPodSandbox":
            call = client.runtime.RunPodSandbox(pod())
        else:
            call = client.runtime.ExecSync(pb.ExecSyncRequest(container_id="0", cmd=["sleep"]))
        await runtime.entered.wait()
        call.cancel()
        await runtime.cancelled.wait()

    run(tmp_path, scenario)


def test_failure_after_the_caller_left_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        runtime.gate.clear()
        call = client.runtime.StartContainer(pb.StartContainerRequest(container_id=UNKNOWN_ID))
        await runtime.entered.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await client.runtime.Version(pb.VersionRequest())
        runtime.gate.set()
        await runtime.finished.wait()

    with caplog.at_level(logging.WARNING, "tare.cri"):
        run(tmp_path, scenario)
    assert "StartContainer failed after its caller had left: find container ffff" in caplog.text


def test_large_messages_pass_both_ways(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        request = pod()
        request.config.annotations["large"] = "x" * (17 << 20)
        pod_id = (await client.runtime.RunPodSandbox(request)).pod_sandbox_id
        reply = await client.runtime.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id))
        assert len(reply.status.annotations["large"]) == 17 << 20

    run(tmp_path, scenario)


def test_long_errors_fit_into_a_header(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime, images: MemoryImages) -> None:
        runtime.fault = NotFound("RegistryUnavailable: " + "é" * 50_000, cause="the end")
        code, message = await failing(client.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id="0")))
        assert code is grpc.StatusCode.NOT_FOUND
        assert message.startswith("RegistryUnavailable: é")
        assert message.endswith("é: the end")

    run(tmp_path, scenario)
