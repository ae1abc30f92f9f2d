"""The node resource interface (NRI): plugins of the node that see every pod and container, and change containers as they are made.

For who writes a plugin, `Plugin`, `run` and the messages are here:

    from tare.nri import ContainerAdjustment, Plugin, run

In the daemon:

    server      the socket                         hub       who is asked what, and when      merge      what several plugins want, as one
    front       what the runtime sees of it        peer      one plugin                       owners     who has set what
    launched    plugins that are started here      view      pods and containers, as messages adjust     that, in a container's configuration
                                                   limits    limits, likewise                 validator  what is not allowed to them
    frames      bytes and frames (sans-I/O)        rpc       calls over a socket              interface  the calls, as a table
    names       names                              plugin    the other end
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tare.nri.plugin import Plugin, run
    from tare.nri.v1.nri_pb2 import (
        CDIDevice,
        Container,
        ContainerAdjustment,
        ContainerEviction,
        ContainerUpdate,
        CreateContainerResponse,
        Hook,
        Hooks,
        KeyValue,
        LinuxContainerAdjustment,
        LinuxContainerUpdate,
        LinuxCPU,
        LinuxDevice,
        LinuxMemory,
        LinuxNamespace,
        LinuxPids,
        LinuxResources,
        Mount,
        OptionalBool,
        OptionalFileMode,
        OptionalInt,
        OptionalInt64,
        OptionalString,
        OptionalUInt32,
        OptionalUInt64,
        PodSandbox,
        POSIXRlimit,
        UpdateContainerResponse,
        ValidateContainerAdjustmentRequest,
    )

__all__ = [
    "CDIDevice",
    "Container",
    "ContainerAdjustment",
    "ContainerEviction",
    "ContainerUpdate",
    "CreateContainerResponse",
    "Hook",
    "Hooks",
    "KeyValue",
    "LinuxCPU",
    "LinuxContainerAdjustment",
    "LinuxContainerUpdate",
    "LinuxDevice",
    "LinuxMemory",
    "LinuxNamespace",
    "LinuxPids",
    "LinuxResources",
    "Mount",
    "OptionalBool",
    "OptionalFileMode",
    "OptionalInt",
    "OptionalInt64",
    "OptionalString",
    "OptionalUInt32",
    "OptionalUInt64",
    "POSIXRlimit",
    "Plugin",
    "PodSandbox",
    "UpdateContainerResponse",
    "ValidateContainerAdjustmentRequest",
    "run",
]


def __getattr__(name: str) -> object:
    """What is for plugins is imported when it is asked for: a daemon that has none does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("tare.nri.plugin" if name in ("Plugin", "run") else "tare.nri.v1.nri_pb2"), name)
