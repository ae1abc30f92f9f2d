"""Pods by CNI plugins, through the gRPC socket of a real daemon: Debian's plugins with packets, and the life of a configuration."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.cni import CniNode, cni_node, until
from tests.support.netns import Namespace, sh, wire

pytestmark = pytest.mark.root

V4, V6 = "10.77.0.0/24", "fd77::/64"


@pytest.fixture(scope="module")
def shared() -> Iterator[CniNode]:
    with cni_node("cni", settings='conf_template = "DIRECTORY/template"') as node:
        yield node


@pytest.fixture
def node(shared: CniNode) -> Iterator[CniNode]:
    """The node, on which each test must leave nothing."""
    shared.clear()
    yield shared
    shared.remove_all()
    assert shared.settled() == [], shared.daemon.told()


def addresses(node: CniNode, pod: str) -> list[str]:
    """Those of PodSandboxStatus, the primary one first."""
    network = node.pod_status(pod).network
    return [network.ip, *(item.ip for item in network.additional_ips)]


def bridge(node: CniNode, **more: Any) -> dict[str, Any]:
    """The bridge plugin with both families."""
    return {
        "type": "bridge",
        "bridge": "cni7",
        "isDefaultGateway": True,
        "ipMasq": True,
        "ipam": node.ipam(V4, V6),
        **more,
    }


def test_without_a_configuration_and_with_one(node: CniNode) -> None:
    """No network is a condition, in the kubelet's words, and never another network; what is brought is taken at once."""
    condition = node.network_condition()
    assert (condition.status, condition.reason) == (False, "NetworkPluginNotReady")
    assert "cni plugin not initialized" in condition.message and str(node.configurations) in condition.message
    node.refused("FAILED_PRECONDITION", "cni plugin not initialized", node.run_pod, "early")
    assert node.settled() == []
    node.bring(bridge(node))
    assert node.network_condition().status
    assert addresses(node, node.run_pod("first")) == ["10.77.0.2", "fd77::2"]
    node.bring(bridge(node, ipam=node.ipam("10.78.0.0/24"), bridge="cni8"))
    assert addresses(node, node.run_pod("second")) == ["10.78.0.2"]
    info = node.network_info()
    assert (info["mode"], info["network"], info["cniVersion"]) == ("cni", "pods", "1.0.0")


def test_the_first_file_counts_and_a_broken_one_is_an_error(node: CniNode) -> None:
    node.bring(bridge(node), name="20-good.conflist")
    (node.configurations / "10-bad.conf").write_text('{"cniVersion": "1.0.0", "name": "x", ')
    condition = node.network_condition()
    assert not condition.status and "10-bad.conf: it is not JSON" in condition.message
    node.refused("FAILED_PRECONDITION", "10-bad.conf", node.run_pod, "broken")
    (node.configurations / "10-bad.conf").rename(node.configurations / "10-bad.off")
    assert node.network_condition().status


def test_a_chain_of_debian_plugins(node: CniNode) -> None:
    """Addresses, a published port in both families, a limit in the kernel, a sysctl; and of all of it nothing when the pod is gone."""
    chain = (
        bridge(node),
        {"type": "portmap", "capabilities": {"portMappings": True}},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}, "ingressRate": 8000000, "ingressBurst": 8000000},
        {"type": "firewall"},
        {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.log_martians": "1"}},
    )
    node.bring(*chain)
    port = pb.PortMapping(protocol=pb.TCP, container_port=80, host_port=8077)
    pod = node.run_pod(node.pod_config("web", port_mappings=[port]))
    assert addresses(node, pod) == ["10.77.0.2", "fd77::2"]
    with node.inside(pod) as inside, Namespace() as outside:
        assert {link["ifname"]: "UP" in link["flags"] for link in inside.ip("link show")} == {"lo": True, "eth0": True}
        assert inside.sh("cat /proc/sys/net/ipv4/conf/eth0/log_martians").strip() == "1"
        assert "rate 8Mbit" in node.place.sh("tc qdisc show")
        node.place.run(lambda: wire(outside, "wire", "up0"))
        node.place.sh("ip addr add 192.0.2.1/24 dev wire")
        outside.sh("ip addr add 192.0.2.2/24 dev up0")
        listener = inside.run(lambda: socket.create_server(("", 80)))
        with listener:
            for place, address in ((node.place, ("10.77.0.2", 80)), (outside, ("192.0.2.1", 8077))):
                with place.run(lambda address=address: socket.create_connection(address, 5)) as client:  # type: ignore[misc]
                    peer, _ = listener.accept()
                    peer.sendall(b"here")
                    peer.close()
                    assert client.recv(10) == b"here"
    node.stop_pod(pod)
    assert "10.77.0.2" not in node.place.sh("iptables-save")


@pytest.mark.parametrize("kind", ["ptp", "macvlan"])
def test_other_interface_plugins(node: CniNode, kind: str) -> None:
    plugin: dict[str, Any] = {"type": kind, "ipam": node.ipam(V4)}
    with Namespace() as outside:
        if kind == "macvlan":
            node.place.run(lambda: wire(outside, "wire", "up0"))
            plugin["master"] = "wire"
        node.bring(plugin, version="0.4.0")
        one, other = node.run_pod("one"), node.run_pod("other")
        (first,), (second,) = addresses(node, one), addresses(node, other)
        with node.inside(one) as inside:
            if kind == "ptp":
                node.place.run(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
            assert "1 received" in inside.sh(f"ping -c1 -W5 {second}")
        assert first != second
        node.remove_all()  # while macvlan's master is there


def test_results_are_kept_as_libcni_does(node: CniNode) -> None:
    node.bring(bridge(node))
    pod = node.run_pod("kept")
    kept = json.loads((node.results / f"pods-{pod}-eth0").read_text())
    assert (kept["kind"], kept["containerId"], kept["ifName"], kept["networkName"]) == (
        "cniCacheV1",
        pod,
        "eth0",
        "pods",
    )
    assert json.loads(base64.b64decode(kept["config"]))["plugins"][0]["bridge"] == "cni7"
    assert kept["netns"] == str(node.daemon.run / "pods" / pod / "net")
    assert ["K8S_POD_NAME", "kept"] in kept["cniArgs"] and kept["result"]["cniVersion"] == "1.0.0"
    assert [item["address"] for item in kept["result"]["ips"]] == ["10.77.0.2/24", "fd77::2/64"]


def test_what_plugins_are_told(node: CniNode) -> None:
    """Names as Kubernetes plugins look for them, capabilities for those that have them, the result of the one before."""
    names = ("portMappings", "bandwidth", "dns", "mac", "ips", "cgroupPath")
    plugin = node.scripted(capabilities=dict.fromkeys(names, True))
    node.bring(plugin, node.scripted("second"), version="0.4.0")
    port = pb.PortMapping(protocol=pb.UDP, container_port=53, host_port=5353, host_ip="192.0.2.1")
    annotations = {"network.tare.dev/mac": "02:00:00:00:00:07", "network.tare.dev/ips": "192.0.2.7/24, fd00::7/64"}
    dns = pb.DNSConfig(servers=["192.0.2.53"], searches=["cluster.local"], options=["ndots:5"])
    pod = node.run_pod(node.pod_config("told", port_mappings=[port], annotations=annotations, dns_config=dns))
    first, second = node.noted("ADD")
    assert first["told"]["runtimeConfig"] == {
        "portMappings": [{"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "192.0.2.1"}],
        "dns": {"servers": ["192.0.2.53"], "searches": ["cluster.local"], "options": ["ndots:5"]},
        "mac": "02:00:00:00:00:07",
        "ips": ["192.0.2.7/24", "fd00::7/64"],
    }
    assert "capabilities" not in first["told"] and "runtimeConfig" not in second["told"]
    assert "prevResult" not in first["told"] and second["told"]["prevResult"]["ips"][0]["version"] == "4"
    args = dict(pair.split("=") for pair in first["environment"]["CNI_ARGS"].split(";"))
    assert args == {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": "tests",
        "K8S_POD_NAME": "told",
        "K8S_POD_INFRA_CONTAINER_ID": pod,
        "K8S_POD_UID": "uid-told",
    }
    node.stop_pod(pod)
    assert [note["plugin"] for note in node.noted("DEL")] == ["second", "scripted"]
    assert node.noted("DEL")[0]["told"]["prevResult"]["ips"][0]["address"] == "192.0.2.7/24"


def test_an_address_that_nobody_can_give_is_refused(node: CniNode) -> None:
    node.bring(bridge(node))
    config = node.pod_config("wants", annotations={"network.tare.dev/ips": "10.77.0.9/24"})
    node.refused("INVALID_ARGUMENT", "no plugin of the network takes ips", node.run_pod, config)


def test_deletion_is_as_the_addition_was(node: CniNode) -> None:
    """The configuration may change, or go, while a pod lives."""
    node.bring(bridge(node), node.scripted(tag="at ADD"))
    pod = node.run_pod("lives")
    node.bring({"type": "ptp", "ipam": node.ipam("10.79.0.0/24")})
    node.stop_pod(pod)
    assert [note["told"]["tag"] for note in node.noted("DEL")] == ["at ADD"]
    assert node.addresses_held() == []


def test_the_pod_cidr_of_the_cluster(node: CniNode) -> None:
    """It is given to plugins that take ranges."""
    ipam = {"type": "host-local", "dataDir": str(node.leases)}
    node.bring(bridge(node, ipam=ipam, capabilities={"ipRanges": True}, bridge="cni9"))
    (node.notes.parent / "template").write_text('{"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": "ptp"}]}')
    use(node, "10.80.0.0/24,fd80::/64")
    assert [path.name for path in node.configurations.iterdir()] == ["10-test.conflist"]
    assert addresses(node, node.run_pod("ranged")) == ["10.80.0.2", "fd80::2"]


def use(node: CniNode, cidr: str) -> None:
    """UpdateRuntimeConfig."""
    client = node.daemon.client
    config = pb.RuntimeConfig(network_config=pb.NetworkConfig(pod_cidr=cidr))
    client.call(client.runtime.UpdateRuntimeConfig, pb.UpdateRuntimeConfigRequest(runtime_config=config))


def test_a_configuration_from_a_template(node: CniNode) -> None:
    ipam = {**node.ipam(), "ranges": "$RANGES", "routes": "$ROUTES"}
    plugins = [{"type": "ptp", "ipam": ipam}]
    template = {"cniVersion": "1.0.0", "name": "made", "plugins": plugins}
    (node.notes.parent / "template").write_text(json.dumps(template))
    assert not node.network_condition().status
    use(node, "10.81.0.0/24,fd81::/64")
    assert node.network_condition().status
    pod = node.run_pod("made")
    assert addresses(node, pod) == ["10.81.0.2", "fd81::2"]
    with node.inside(pod) as inside:
        assert "default via 10.81.0.1" in inside.sh("ip route") and "default via fd81::1" in inside.sh("ip -6 route")


def test_ten_at_once(node: CniNode) -> None:
    node.bring(bridge(node), {"type": "portmap", "capabilities": {"portMappings": True}})
    with ThreadPoolExecutor(10) as pool:
        pods = list(pool.map(node.run_pod, [f"pod{number}" for number in range(10)]))
        assert len({address for pod in pods for address in addresses(node, pod)}) == 20
        list(pool.map(node.stop_pod, pods))
    assert node.addresses_held() == []


def test_a_netns_deleted_from_outside(node: CniNode) -> None:
    node.bring(bridge(node))
    pod = node.run_pod("gone")
    sh(f"umount {node.daemon.run}/pods/{pod}/net")
    node.stop_pod(pod)
    until(lambda: node.addresses_held() == [])


def test_the_whole_path_and_check_on_demand(node: CniNode) -> None:
    """`tare inspect POD`, `tare network ls` and `check` tell of plugins' work what the kernel has of it, and what CHECK says."""
    node.bring(bridge(node), node.scripted())
    pod = node.run_pod("web")
    info = node.daemon.client.call(
        node.daemon.client.runtime.PodSandboxStatus, pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    ).info["info"]
    found = json.loads(info)["network"]
    assert (found["mode"], found["name"], found["plugins"]) == ("cni", "pods", ["bridge", "scripted"])
    assert found["result"]["ips"][0]["address"] == "10.77.0.2/24" and found["troubles"] == []
    loopback, eth0 = found["interfaces"]
    assert loopback["up"] and "10.77.0.2/24" in eth0["addresses"] and eth0["peer"]["bridge"] == "cni7"
    assert ("0.0.0.0/0", "10.77.0.1") in [(route["destination"], route["gateway"]) for route in found["routes"]]
    networks = {item["name"]: item for item in json.loads(tare(node, "network", "ls", "-o", "json").stdout)}
    assert (networks["pods"]["mode"], networks["pods"]["pods"]) == ("cni", {pod: "10.77.0.2/24, fd77::2/64"})
    assert tare(node, "network", "check").returncode == 0
    assert "remove network pods: it is CNI's (take its configuration away" in tare(node, "network", "rm", "pods").stderr
    node.tell("CHECK", "error")
    result = tare(node, "network", "check", "web")
    assert result.returncode == 1 and "plugin scripted, CHECK: the sky fell" in " ".join(result.stdout.split())
    node.refused(
        "FAILED_PRECONDITION",
        "with CNI there is one network",
        node.run_pod,
        node.pod_config("blue", annotations={"network.tare.dev/network": "blue"}),
    )


def tare(node: CniNode, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line."""
    environment = {**os.environ, "TARE_SOCKET": str(node.daemon.socket)}
    command = [sys.executable, "-m", "tare.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
