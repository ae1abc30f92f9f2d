"""CNI's values: what configurations say, what plugins are told and answer, what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.network.cni import arguments, cache, config, result, template
from tare.network.cni.driver import attachment_of
from tare.network.hostports import Port
from tare.network.wishes import Wishes


def conflist(**more: Any) -> str:
    return json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}], **more})


def test_a_list_and_a_single_plugin() -> None:
    network = config.parse(conflist(disableCheck=True), "a.conflist")
    assert (network.name, network.version, network.disable_check) == ("pods", "1.0.0", True)
    single = config.parse('{"cniVersion": "0.4.0", "name": "one", "type": "ptp", "mtu": 1400}', "a.conf")
    assert [(item.type, item.settings["mtu"]) for item in single.plugins] == [("ptp", 1400)]
    assert config.parse(conflist(), "a.json").plugins == network.plugins


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ('{"cniVersion": "1.0.0",', "line 1 column"),
        ("[" * 100000, "not JSON"),
        ("[]", "not a JSON object"),
        (conflist(name=""), "name is"),
        (conflist(name="../x"), "name is"),
        (conflist(cniVersion="0.2.0"), "Tare speaks 0.3.1 to 1.1.0"),
        ('{"name": "x", "type": "y"}', "it has no cniVersion"),
        (conflist(plugins={}), "plugins is not a list"),
        (conflist(plugins=["bridge"]), "not a JSON object"),
        (conflist(plugins=[{}]), "type is missing"),
        (conflist(plugins=[{"type": "../../bin/sh"}]), "not the name of a program"),
        (conflist(plugins=[{"type": "a", "capabilities": ["mac"]}]), "capabilities of plugin a"),
        (conflist(disableGC=3), "disableGC is 3"),
        (conflist(cniVersions="1.0.0"), "cniVersions is not a list"),
    ],
)
def test_a_list_that_is_none(text: str, words: str) -> None:
    with pytest.raises(config.Malformed) as caught:
        config.parse(text, "/etc/cni/net.d/a.conflist")
    assert words in str(caught.value) and "/etc/cni/net.d/a.conflist" in str(caught.value)


def test_the_version_that_all_speak() -> None:
    text = conflist(cniVersions=["0.4.0", "1.1.0", "9.0.0"], plugins=[{"type": "a"}, {"type": "b"}])
    network = config.parse(text, "a.conflist")
    assert network.versions == ("1.1.0", "1.0.0", "0.4.0")
    chosen = config.negotiate(network, {"a": ["0.4.0", "1.0.0", "1.1.0"], "b": ["0.4.0", "1.0.0"]})
    assert chosen.version == "1.0.0" and json.loads(config.document(chosen))["cniVersion"] == "1.0.0"
    with pytest.raises(config.Malformed, match=r"plugin b does not speak version 1\.1\.0, but 0\.1\.0"):
        config.negotiate(network, {"a": ["1.1.0"], "b": ["0.1.0"]})


def test_the_document_says_the_same() -> None:
    network = config.parse(conflist(plugins=[{"type": "a", "capabilities": {"mac": True}, "x": [1]}]), "a.conflist")
    again = config.parse(config.document(network), "a.conflist")
    assert (again.name, again.versions, again.plugins) == (network.name, network.versions, network.plugins)
    assert again.inlined and not again.disable_check


def test_what_a_plugin_is_told() -> None:
    text = conflist(plugins=[{"type": "a", "capabilities": {"mac": True, "ips": False, "dns": True}, "name": "other"}])
    network = config.parse(text, "a.conflist")
    told = config.payload(
        network, network.plugins[0], previous={"ips": []}, capabilities={"mac": "02:00:00:00:00:01", "ips": ["x"]}
    )
    assert json.loads(told) == {
        "type": "a",
        "name": "pods",
        "cniVersion": "1.0.0",
        "runtimeConfig": {"mac": "02:00:00:00:00:01"},
        "prevResult": {"ips": []},
    }


def test_files_by_name(tmp_path: Path) -> None:
    assert config.listing(tmp_path / "none") == ()
    for name in ("20.conf", "10.conflist", "05.txt", "30.json"):
        (tmp_path / name).write_text(conflist())
    (tmp_path / "00.conf").mkdir()
    assert [name for name, _, _ in config.listing(tmp_path)] == ["10.conflist", "20.conf", "30.json"]


def test_plugins_beside_a_list(tmp_path: Path) -> None:
    (tmp_path / "10.conflist").write_text(conflist())
    (tmp_path / "pods").mkdir()
    (tmp_path / "pods" / "5.conf").write_text('{"type": "tuning"}')
    assert [item.type for item in config.load(tmp_path, config.listing(tmp_path)).plugins] == ["bridge", "tuning"]
    (tmp_path / "10.conflist").write_text(conflist(loadOnlyInlinedPlugins=True))
    assert [item.type for item in config.load(tmp_path, config.listing(tmp_path)).plugins] == ["bridge"]
    (tmp_path / "10.conflist").write_text(conflist(plugins=[], loadOnlyInlinedPlugins=True))
    with pytest.raises(config.Malformed, match="it has no plugins"):
        config.load(tmp_path, config.listing(tmp_path))


ANSWER: Mapping[str, Any] = {
    "cniVersion": "1.1.0",
    "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/n", "mac": "02:00:00:00:00:01", "mtu": 1500}],
    "ips": [
        {"address": "10.0.0.2/24", "gateway": "10.0.0.1", "interface": 1},
        {"address": "10.9.9.1/24", "interface": 0},
        {"address": "fd00::2/64", "interface": 1},
    ],
    "routes": [{"dst": "0.0.0.0/0", "mtu": 1400}],
}


def test_a_result_in_every_version() -> None:
    for version in config.VERSIONS:
        found = result.parse(json.dumps(ANSWER), version)
        assert found["cniVersion"] == version
        assert ("version" in found["ips"][0]) == (version in ("0.3.1", "0.4.0"))
        assert ("mtu" in found["routes"][0]) == ("mtu" in found["interfaces"][1]) == (version == "1.1.0")
        assert result.convert(result.convert(found, "0.4.0"), version) == found or version == "1.1.0"
    old = result.parse(json.dumps(ANSWER), "0.3.1")
    assert [item["version"] for item in old["ips"]] == ["4", "4", "6"]


def test_addresses_of_the_pod() -> None:
    network = config.parse(conflist(), "a.conflist")
    found = attachment_of(ANSWER, network, "p")
    assert (found.ips, found.mac, found.gateway) == (("10.0.0.2", "fd00::2"), "02:00:00:00:00:01", "10.0.0.1")
    bare = attachment_of({"ips": [{"address": "10.0.0.3/24"}]}, network, "p")
    assert bare.ips == ("10.0.0.3",)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (" \n", "printed no result"),
        ("hello", "not JSON: 'hello'"),
        ("[]", "not a JSON object"),
        ("[" * 100000, "not JSON"),
        ('{"code": 7, "msg": "no"}', "printed an error"),
        ('{"cniVersion": "0.2.0"}', "of version 0.2.0"),
        ('{"ips": 3}', "ips is not a list of objects"),
        ('{"ips": [{"address": "nowhere"}]}', "address that is none"),
        ('{"ips": [{"address": "10.0.0.1/8", "interface": 1}], "interfaces": [{"name": "a"}]}', "interface 1"),
        ('{"ips": [{"address": "10.0.0.1/8", "interface": true}], "interfaces": [{"name": "a"}]}', "interface True"),
        ('{"interfaces": [{}]}', "without a name"),
        ('{"interfaces": [{"name": "a", "mac": 3}]}', "mac is not a string"),
        ('{"interfaces": [{"name": null}]}', "without a name"),
        ('{"ips": [null]}', "ips is not a list of objects"),
    ],
)
def test_a_result_that_is_none(output: str, words: str) -> None:
    with pytest.raises(result.NoResult) as caught:
        result.parse(output, "1.0.0")
    assert words in str(caught.value)


def test_what_is_null_in_a_result_is_absent() -> None:
    interface = '{"name": "eth0", "mac": null, "sandbox": null}'
    output = f'{{"dns": null, "interfaces": [{interface}], "ips": [{{"address": "10.0.0.1/8", "gateway": null}}]}}'
    assert result.parse(output, "1.1.0") == {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "eth0"}],
        "ips": [{"address": "10.0.0.1/8"}],
    }


def test_a_plugins_error_is_shown_in_part_and_in_one_line() -> None:
    refused = result.refusal(json.dumps({"msg": "x" * 100_000, "details": "two\nlines"}))
    assert refused == (0, "x" * result.QUOTED + "…; 'two\\nlines'")


def test_a_plugins_error() -> None:
    refused = result.refusal('{"code": 11, "msg": "busy", "details": "a lock"}')
    assert refused == (11, "busy; a lock; it asks to be tried again later (code 11)")
    assert result.refusal('{"msg": "busy", "code": "x"}') == (0, "busy")
    assert result.refusal("busy") is None and result.refusal('{"code": 1}') is None


def test_what_a_pod_wants_in_plugins_words() -> None:
    ports = (Port(protocol="sctp", host_port=1, container_port=2, host_ip="::1"),)
    wishes = Wishes(name="a", ports=ports, ingress=10**9, egress=1000, cgroup_parent="/x")
    found = arguments.capabilities("p", wishes, ["10.0.0.0/24"], frozenset())
    assert found == {
        "portMappings": [{"hostPort": 1, "containerPort": 2, "protocol": "sctp", "hostIP": "::1"}],
        "bandwidth": {"ingressRate": 10**9, "ingressBurst": 10**8, "egressRate": 1000, "egressBurst": 1 << 20},
        "ipRanges": [[{"subnet": "10.0.0.0/24"}]],
        "cgroupPath": "/x",
    }


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ({arguments.MAC: "02:00:00:00:00:01"}, "no plugin of the network takes mac"),
        ({arguments.MAC: "two"}, "no hardware address"),
        ({arguments.IPS: "10.0.0.300"}, "10.0.0.300"),
    ],
)
def test_wishes_that_cannot_be_met(annotations: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        arguments.capabilities("p", Wishes(annotations=annotations), (), frozenset(("ips",)))


def test_a_name_that_would_be_another_argument() -> None:
    with pytest.raises(InvalidArgument, match="K8S_POD_NAME"):
        arguments.cni_args("p", Wishes(name="a;K8S_POD_UID=other"))


ATTACHED = cache.Attachment(
    container_id="c1",
    network="pods",
    interface="eth0",
    netns="/run/n",
    config=b"{}",
    args=(("A", "b"),),
    capabilities={"mac": "x"},
    result={"ips": []},
)


def test_the_cache(tmp_path: Path) -> None:
    kept = cache.Cache(tmp_path)
    assert kept.all("pods") == [] and kept.get("pods", "c1", "eth0") is None
    kept.put(ATTACHED)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["pods-c1-eth0"]
    assert (tmp_path / "results" / "pods-c1-eth0").stat().st_mode & 0o777 == 0o600
    (tmp_path / "results" / "pods-x-eth0").write_text("not ours")
    (tmp_path / "results" / "pods-2-c9-eth0").write_bytes(cache.encode(ATTACHED).replace(b'"pods"', b'"pods-2"'))
    assert kept.all("pods") == [ATTACHED] == [kept.get("pods", "c1", "eth0")]
    kept.remove("pods", "c1", "eth0")
    kept.remove("pods", "c1", "eth0")
    assert kept.all("pods") == []


def test_only_a_namespace_lives(tmp_path: Path) -> None:
    assert cache.lives("/proc/self/ns/net")
    assert not cache.lives("") and not cache.lives(str(tmp_path)) and not cache.lives(str(tmp_path / "none"))


TEMPLATE = conflist(
    plugins=[{"type": "ptp", "cidr": "$POD_CIDR", "ipam": {"ranges": "$RANGES", "routes": "$ROUTES", "a": "$X"}}]
)


def test_a_template() -> None:
    [plugin] = config.parse(template.fill(TEMPLATE, ["10.0.0.0/24", "fd00::/64"], "t"), "t.conflist").plugins
    assert plugin.settings["cidr"] == "10.0.0.0/24"
    assert plugin.settings["ipam"] == {
        "ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "fd00::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        "a": "$X",
    }
    for text in ("{", '{"plugins": []}', conflist(plugins=[])):
        with pytest.raises(config.Malformed):
            template.fill(text, ["10.0.0.0/24"], "t")


def test_a_template_is_written_where_nobody_has_brought_a_list(tmp_path: Path) -> None:
    source, directory = tmp_path / "t", tmp_path / "net.d"
    source.write_text(TEMPLATE)
    assert template.write(source, directory, ["10.0.0.0/24"]) is None
    assert template.write(source, directory, ["10.1.0.0/24"]) is None
    assert "10.1.0.0/24" in (directory / template.NAME).read_text()
    assert [path.name for path in directory.iterdir()] == [template.NAME]
    (directory / "05-other.conf").write_text("{}")
    assert template.write(source, directory, ["10.2.0.0/24"]) == "05-other.conf"
    assert "10.1.0.0/24" in (directory / template.NAME).read_text()
