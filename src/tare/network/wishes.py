"""What a pod asks of its network, whichever gives it one. Names as Kubernetes has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tare.network.hostports import Port


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a pod wants of its network beyond an address; `name`, `namespace` and `uid` are the pod's. Rates are in bits a second, 0 for no limit.

    `ingress` is what comes to the pod, `egress` what it sends. `netns` is where its namespace is pinned, for other programs to find it;
    `cgroup_parent` is as the kubelet names it.
    """

    name: str = ""
    namespace: str = ""
    uid: str = ""
    ports: tuple[Port, ...] = ()
    ingress: int = 0
    egress: int = 0
    netns: Path = Path()
    annotations: Mapping[str, str] = field(default_factory=dict)
    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    cgroup_parent: str = ""
