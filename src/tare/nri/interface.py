"""NRI's calls as a table: by name, what is sent and answered, and which bit of a subscription asks for it.

asked    the answer counts: adjustments, updates, a veto           told    only a failure does
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from google.protobuf.message import Message

from tare.nri.v1 import nri_pb2 as pb

PLUGIN, RUNTIME = "nri.pkg.api.v1alpha1.Plugin", "nri.pkg.api.v1alpha1.Runtime"
EVERY_EVENT = (1 << (pb.LAST - 1)) - 1


class Method(NamedTuple):
    """A call that a plugin serves. `event` is its number; 0: every plugin gets it. `told`: older plugins get it as a StateChange."""

    name: str
    event: int
    request: type[Message]
    response: type[Message]
    told: bool = False

    @property
    def bit(self) -> int:
        """Of a subscription."""
        return 1 << (self.event - 1) if self.event else 0


def _method(name: str, event: int = 0, *, told: bool = False) -> Method:
    return Method(name, event, getattr(pb, f"{name}Request"), getattr(pb, f"{name}Response"), told)


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        _method("Configure"),
        _method("Synchronize"),
        Method("Shutdown", 0, pb.Empty, pb.Empty),
        _method("RunPodSandbox", pb.RUN_POD_SANDBOX, told=True),
        _method("UpdatePodSandbox", pb.UPDATE_POD_SANDBOX),
        _method("PostUpdatePodSandbox", pb.POST_UPDATE_POD_SANDBOX, told=True),
        _method("StopPodSandbox", pb.STOP_POD_SANDBOX, told=True),
        _method("RemovePodSandbox", pb.REMOVE_POD_SANDBOX, told=True),
        _method("CreateContainer", pb.CREATE_CONTAINER),
        _method("PostCreateContainer", pb.POST_CREATE_CONTAINER, told=True),
        _method("StartContainer", pb.START_CONTAINER, told=True),
        _method("PostStartContainer", pb.POST_START_CONTAINER, told=True),
        _method("UpdateContainer", pb.UPDATE_CONTAINER),
        _method("PostUpdateContainer", pb.POST_UPDATE_CONTAINER, told=True),
        _method("StopContainer", pb.STOP_CONTAINER),
        _method("RemoveContainer", pb.REMOVE_CONTAINER, told=True),
        _method("ValidateContainerAdjustment", pb.VALIDATE_CONTAINER_ADJUSTMENT),
        Method("StateChange", 0, pb.StateChangeEvent, pb.Empty),
    )
}
