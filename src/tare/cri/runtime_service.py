"""CRI's RuntimeService: each method translates its request, makes one call on the runtime, and translates what comes back.

Methods bear CRI's names, since `dispatch` finds them by those. A method that is not here answers UNIMPLEMENTED.
What measures is in `stats_service`, what answers in streams in `stream_service`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Final

from tare import __version__
from tare.cri import checks, filters, translate_common
from tare.cri import streaming_requests as streaming
from tare.cri import translate_replies as replies
from tare.cri import translate_requests as requests
from tare.cri.listing import Encoded, Lists
from tare.cri.ports import HandlerInfo, RuntimePort, Urls
from tare.cri.stats_service import StatsService
from tare.cri.stream_service import StreamService
from tare.cri.v1 import api_pb2 as pb
from tare.errors import InternalError, Unavailable

KUBELET_API_VERSION: Final = "0.1.0"
RUNTIME_NAME: Final = "tare"
CRI_VERSION: Final = "v1"
POD_ITEMS: Final = pb.ListPodSandboxResponse.ITEMS_FIELD_NUMBER
CONTAINER_ITEMS: Final = pb.ListContainersResponse.CONTAINERS_FIELD_NUMBER
CGROUP_DRIVERS: Final = {"cgroupfs": pb.CGROUPFS, "systemd": pb.SYSTEMD}


class RuntimeService(StatsService, StreamService):
    """`about` is what a verbose Status tells of the daemon, JSON-able: its settings, for one."""

    lasting: frozenset[str] = frozenset(
        {
            "StopPodSandbox",
            "RemovePodSandbox",
            "StartContainer",
            "StopContainer",
            "RemoveContainer",
            "ReopenContainerLog",
            "UpdateContainerResources",
            "UpdatePodSandboxResources",
            "UpdateRuntimeConfig",
        }
    )

    def __init__(self, runtime: RuntimePort, about: Mapping[str, object], urls: Urls | None = None) -> None:
        StatsService.__init__(self, runtime)
        StreamService.__init__(self, runtime)
        self._runtime = runtime
        self._about = about
        self._urls_or_none = urls
        self._pod_lists = Lists(replies.pod_item, POD_ITEMS, runtime.list_pods)
        self._container_lists = Lists(replies.container_item, CONTAINER_ITEMS, runtime.list_containers)

    async def Version(self, request: pb.VersionRequest) -> pb.VersionResponse:
        """What this is."""
        return pb.VersionResponse(
            version=KUBELET_API_VERSION,
            runtime_name=RUNTIME_NAME,
            runtime_version=__version__,
            runtime_api_version=CRI_VERSION,
        )

    async def Status(self, request: pb.StatusRequest) -> pb.StatusResponse:
        """Conditions, handlers (the default one under the empty name as well) and features."""
        conditions = [
            pb.RuntimeCondition(type=item.type, status=item.status, reason=item.reason, message=item.message)
            for item in await self._runtime.conditions()
        ]
        handlers = self._runtime.handlers()
        features = self._runtime.features()
        return pb.StatusResponse(
            status=pb.RuntimeStatus(conditions=conditions),
            info=replies.info(await self._told()) if request.verbose else None,
            runtime_handlers=[
                *(_handler(item, "") for item in handlers if item.name == self._runtime.default_handler()),
                *(_handler(item, item.name) for item in handlers),
            ],
            features=pb.RuntimeFeatures(
                supplemental_groups_policy=features.supplemental_groups_policy,
                user_namespaces_host_network=features.user_namespaces_host_network,
                mount_options=features.mount_options,
            ),
        )

    async def _told(self) -> Mapping[str, object]:
        """What a verbose Status adds."""
        node = await asyncio.to_thread(self._runtime.node_info)
        return {"version": __version__, "cgroupDriver": self._runtime.cgroup_driver(), **self._about, **node}

    async def RuntimeConfig(self, request: pb.RuntimeConfigRequest) -> pb.RuntimeConfigResponse:
        """The cgroup driver, which a kubelet takes over."""
        driver = self._runtime.cgroup_driver()
        if driver not in CGROUP_DRIVERS:
            raise InternalError("tell the cgroup driver", cause=f"{driver!r} is none that CRI knows")
        return pb.RuntimeConfigResponse(linux=pb.LinuxRuntimeConfiguration(cgroup_driver=CGROUP_DRIVERS[driver]))

    async def RunPodSandbox(self, request: pb.RunPodSandboxRequest) -> pb.RunPodSandboxResponse:
        """A pod that is READY."""
        config = requests.pod_config(request)
        return pb.RunPodSandboxResponse(pod_sandbox_id=await self._runtime.run_pod(config, request.runtime_handler))

    async def StopPodSandbox(self, request: pb.StopPodSandboxRequest) -> pb.StopPodSandboxResponse:
        """Idempotent."""
        await self._runtime.stop_pod(_pod_id(request.pod_sandbox_id))
        return pb.StopPodSandboxResponse()

    async def RemovePodSandbox(self, request: pb.RemovePodSandboxRequest) -> pb.RemovePodSandboxResponse:
        """Idempotent."""
        await self._runtime.remove_pod(_pod_id(request.pod_sandbox_id))
        return pb.RemovePodSandboxResponse()

    async def PodSandboxStatus(self, request: pb.PodSandboxStatusRequest) -> pb.PodSandboxStatusResponse:
        """The pod with its containers, all of one moment."""
        view = self._runtime.pod_status(_pod_id(request.pod_sandbox_id))
        return pb.PodSandboxStatusResponse(
            status=replies.pod_status(view.record),
            info=replies.info(await self._runtime.pod_info(view.record.id)) if request.verbose else None,
            containers_statuses=[replies.container_status(record) for record in view.containers],
            timestamp=time.time_ns(),
        )

    async def ListPodSandbox(self, request: pb.ListPodSandboxRequest) -> Encoded:
        """The pods that fit."""
        return self._pod_lists.encoded(filters.pod_filter(request).select(self._runtime.list_pods()))

    async def CreateContainer(self, request: pb.CreateContainerRequest) -> pb.CreateContainerResponse:
        """A container that is CREATED. Where the client leaves out the pod's configuration, it is the one that the pod was made from."""
        pod_id = _pod_id(request.pod_sandbox_id)
        config = requests.container_config(request)
        given = request.HasField("sandbox_config")
        pod_config = requests.pod_config(request) if given else self._runtime.pod_status(pod_id).record.config
        container_id = await self._runtime.create_container(pod_id, config, pod_config)
        return pb.CreateContainerResponse(container_id=container_id)

    async def StartContainer(self, request: pb.StartContainerRequest) -> pb.StartContainerResponse:
        """The container runs."""
        await self._runtime.start_container(_container_id(request.container_id))
        return pb.StartContainerResponse()

    async def StopContainer(self, request: pb.StopContainerRequest) -> pb.StopContainerResponse:
        """Idempotent. A grace of zero seconds or less is none."""
        container_id = _container_id(request.container_id)
        await self._runtime.stop_container(container_id, float(max(0, request.timeout)))
        return pb.StopContainerResponse()

    async def RemoveContainer(self, request: pb.RemoveContainerRequest) -> pb.RemoveContainerResponse:
        """Idempotent."""
        await self._runtime.remove_container(_container_id(request.container_id))
        return pb.RemoveContainerResponse()

    async def ListContainers(self, request: pb.ListContainersRequest) -> Encoded:
        """The containers that fit."""
        return self._container_lists.encoded(filters.container_filter(request).select(self._runtime.list_containers()))

    async def ContainerStatus(self, request: pb.ContainerStatusRequest) -> pb.ContainerStatusResponse:
        """The container in full."""
        record = self._runtime.container_status(_container_id(request.container_id))
        return pb.ContainerStatusResponse(
            status=replies.container_status(record),
            info=replies.info(self._runtime.container_info(record.id)) if request.verbose else None,
        )

    async def UpdateContainerResources(
        self, request: pb.UpdateContainerResourcesRequest
    ) -> pb.UpdateContainerResourcesResponse:
        """All the limits that the request names hold, or none was changed."""
        container_id = _container_id(request.container_id)
        await self._runtime.update_container(container_id, translate_common.resources(request.linux, "linux"))
        return pb.UpdateContainerResourcesResponse()

    async def UpdatePodSandboxResources(
        self, request: pb.UpdatePodSandboxResourcesRequest
    ) -> pb.UpdatePodSandboxResourcesResponse:
        """The same for a pod; where a kubelet has made its control group, it has changed that too, and this is noted."""
        pod_id = _pod_id(request.pod_sandbox_id)
        overhead = translate_common.resources(request.overhead, "overhead") if request.HasField("overhead") else None
        await self._runtime.update_pod(pod_id, translate_common.resources(request.resources, "resources"), overhead)
        return pb.UpdatePodSandboxResourcesResponse()

    async def UpdateRuntimeConfig(self, request: pb.UpdateRuntimeConfigRequest) -> pb.UpdateRuntimeConfigResponse:
        """The range of pods' addresses; none is named before the cluster has given the node one."""
        ranges = requests.pod_ranges(request.runtime_config.network_config.pod_cidr)
        if ranges:
            await self._runtime.use_pod_ranges(ranges)
        return pb.UpdateRuntimeConfigResponse()

    async def ExecSync(self, request: pb.ExecSyncRequest) -> pb.ExecSyncResponse:
        """What the command wrote, and its exit code."""
        container_id = _container_id(request.container_id)
        command, timeout = requests.command(request), requests.timeout(request.timeout)
        result = await self._runtime.exec_sync(container_id, command, timeout)
        return pb.ExecSyncResponse(stdout=result.stdout, stderr=result.stderr, exit_code=result.exit_code)

    async def Exec(self, request: pb.ExecRequest) -> pb.ExecResponse:
        """Where to stream a command."""
        container_id, command = _container_id(request.container_id), streaming.command(request)
        return pb.ExecResponse(url=self._urls.exec(container_id, command, streaming.wanted(request)))

    async def Attach(self, request: pb.AttachRequest) -> pb.AttachResponse:
        """Where to stream a container's own streams."""
        return pb.AttachResponse(url=self._urls.attach(_container_id(request.container_id), streaming.wanted(request)))

    async def PortForward(self, request: pb.PortForwardRequest) -> pb.PortForwardResponse:
        """Where to stream connections to a pod's ports."""
        return pb.PortForwardResponse(
            url=self._urls.port_forward(_pod_id(request.pod_sandbox_id), streaming.ports(request))
        )

    @property
    def _urls(self) -> Urls:
        if self._urls_or_none is None:
            raise Unavailable("hand out a URL for streaming", cause="the streaming server does not run")
        return self._urls_or_none

    async def CheckpointContainer(self, request: pb.CheckpointContainerRequest) -> pb.CheckpointContainerResponse:
        """The archive is written; the container goes on."""
        container_id = _container_id(request.container_id)
        location, timeout = checks.absolute(request.location, "location"), requests.timeout(request.timeout)
        await self._runtime.checkpoints.checkpoint_container(container_id, location, timeout)
        return pb.CheckpointContainerResponse()

    async def CheckpointPod(self, request: pb.CheckpointPodRequest) -> pb.CheckpointPodResponse:
        """The directory is written; the pod goes on."""
        pod_id, location = _pod_id(request.pod_sandbox_id), checks.absolute(request.output_path, "output_path")
        names = [requests.identifier(name, "container_ids") for name in request.container_ids]
        await self._runtime.checkpoints.checkpoint_pod(pod_id, location, names, dict(request.options))
        return pb.CheckpointPodResponse()

    async def RestorePod(self, request: pb.RestorePodRequest) -> pb.RestorePodResponse:
        """A pod that is READY, with containers that are CREATED."""
        location = checks.absolute(request.checkpoint_path, "checkpoint_path")
        config = requests.restored_pod(request)
        containers = requests.restored_containers(request)
        pod_id, made = await self._runtime.checkpoints.restore_pod(
            location, config, request.runtime_handler, containers, dict(request.options)
        )
        restored = [pb.RestoredContainer(name=name, container_id=made[name]) for name in sorted(made)]
        return pb.RestorePodResponse(pod_sandbox_id=pod_id, restored_containers=restored)

    async def ReopenContainerLog(self, request: pb.ReopenContainerLogRequest) -> pb.ReopenContainerLogResponse:
        """Lines go to a new file."""
        await self._runtime.reopen_log(_container_id(request.container_id))
        return pb.ReopenContainerLogResponse()


def _handler(item: HandlerInfo, name: str) -> pb.RuntimeHandler:
    features = pb.RuntimeHandlerFeatures(
        recursive_read_only_mounts=item.recursive_read_only, user_namespaces=item.user_namespaces
    )
    return pb.RuntimeHandler(name=name, features=features)


def _pod_id(value: str) -> str:
    return requests.identifier(value, "pod_sandbox_id")


def _container_id(value: str) -> str:
    return requests.identifier(value, "container_id")
