"""What a pod wants of its network, in CNI's words: CNI_ARGS, and the capabilities that plugins take in their runtimeConfig. Pure.

Each plugin gets those that it says it knows. What nobody of a list knows is refused where a pod asks for it by annotation; a published
port is not, since some networks find host ports in the cluster by themselves. Source: CNI conventions (CONVENTIONS.md), well-known capabilities.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tare.errors import InvalidArgument
from tare.network.wishes import Wishes

IPS = "network.tare.dev/ips"  # addresses with prefix length, parted by commas
MAC = "network.tare.dev/mac"
MAC_ADDRESS = re.compile("[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
BURST_SHARE = 10  # of a second: what may come at once over the rate
MIN_BURST, MAX_BURST = (
    1 << 20,
    (1 << 32) - 1,
)  # bits; 64 KiB that the kernel segments late must fit, and the plugin takes no more


def cni_args(pod_id: str, wishes: Wishes) -> tuple[tuple[str, str], ...]:
    """The pairs of CNI_ARGS. Raises InvalidArgument for a value that cannot be one of them."""
    pairs = (
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", wishes.namespace),
        ("K8S_POD_NAME", wishes.name),
        ("K8S_POD_INFRA_CONTAINER_ID", pod_id),
        ("K8S_POD_UID", wishes.uid),
    )
    for name, value in pairs:
        if ";" in value or "=" in value or "\0" in value:
            cause = f"{name} {value!r} has a character that parts one of CNI's arguments from the next"
            raise InvalidArgument(f"attach pod {pod_id}", cause=cause)
    return pairs


def capabilities(pod_id: str, wishes: Wishes, ranges: Sequence[str], known: frozenset[str]) -> dict[str, Any]:
    """Capability arguments by name; `ranges` are the node's pod CIDRs, `known` is what the list's plugins take. Raises InvalidArgument."""
    wanted = {
        "portMappings": port_mappings(wishes),
        "bandwidth": bandwidth(wishes),
        "ipRanges": [[{"subnet": item}] for item in ranges],
        "dns": dns(wishes),
        "mac": mac(pod_id, wishes.annotations),
        "ips": ips(pod_id, wishes.annotations),
        "cgroupPath": wishes.cgroup_parent,
    }
    for name, annotation in (("mac", MAC), ("ips", IPS)):
        if wanted[name] and name not in known:
            hint = f'a plugin with "capabilities": {{"{name}": true}} has to be in the list'
            raise InvalidArgument(
                f"attach pod {pod_id}",
                cause=f"annotation {annotation}: no plugin of the network takes {name}",
                hint=hint,
            )
    return {name: value for name, value in wanted.items() if value}


def port_mappings(wishes: Wishes) -> list[dict[str, Any]]:
    """Published ports."""
    return [
        {
            "hostPort": port.host_port,
            "containerPort": port.container_port,
            "protocol": port.protocol,
            "hostIP": port.host_ip,
        }
        for port in wishes.ports
    ]


def bandwidth(wishes: Wishes) -> dict[str, int]:
    """Rates and bursts in bits (a second)."""
    found = {}
    for name, rate in (("ingress", wishes.ingress), ("egress", wishes.egress)):
        if rate:
            found[f"{name}Rate"] = rate
            found[f"{name}Burst"] = min(MAX_BURST, max(MIN_BURST, rate // BURST_SHARE))
    return found


def dns(wishes: Wishes) -> dict[str, list[str]]:
    """What the pod's resolv.conf says."""
    wanted = {"servers": wishes.servers, "searches": wishes.searches, "options": wishes.options}
    return {name: list(value) for name, value in wanted.items() if value}


def mac(pod_id: str, annotations: Mapping[str, str]) -> str:
    """The hardware address that is asked for."""
    value = annotations.get(MAC, "").strip()
    if value and not MAC_ADDRESS.fullmatch(value):
        raise InvalidArgument(f"attach pod {pod_id}", cause=f"annotation {MAC}: {value!r} is no hardware address")
    return value


def ips(pod_id: str, annotations: Mapping[str, str]) -> list[str]:
    """The addresses that are asked for."""
    found = [item.strip() for item in annotations.get(IPS, "").split(",") if item.strip()]
    for item in found:
        try:
            ipaddress.ip_interface(item)
        except ValueError as error:
            raise InvalidArgument(f"attach pod {pod_id}", cause=f"annotation {IPS}: {error}") from error
    return found
