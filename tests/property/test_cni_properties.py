"""Whatever a file says and a plugin prints: a value or the error that is meant for it, and what is kept is had again."""

from __future__ import annotations

import contextlib
import ipaddress
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tare.network.cni import cache, config, result

KEYS = ("cniVersion", "cniVersions", "name", "plugins", "type", "capabilities", "ips", "interfaces", "routes")
MORE_KEYS = ("address", "interface", "sandbox", "mac", "gateway", "msg", "code", "details", "disableCheck")
LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(("1.0.0", "0.3.1", "a", "10.0.0.1/8", "../x"))
VALUES: st.SearchStrategy[Any] = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS + MORE_KEYS), inner, max_size=6),
    max_leaves=20,
)
DOCUMENTS = st.dictionaries(st.sampled_from(KEYS + MORE_KEYS), VALUES, max_size=8).map(json.dumps) | st.text(
    max_size=40
)


@given(DOCUMENTS)
def test_a_configuration_is_one_or_is_malformed(text: str) -> None:
    with contextlib.suppress(config.Malformed):
        network = config.parse(text, "x.conf")
        assert config.parse(config.document(network), "x.conf").plugins == network.plugins
        for plugin in network.plugins:
            json.loads(config.payload(network, plugin, capabilities={"a": 1}))


@given(DOCUMENTS, st.sampled_from(config.VERSIONS))
def test_an_answer_is_a_result_or_is_none(text: str, version: str) -> None:
    with contextlib.suppress(result.NoResult):
        found = result.parse(text, version)
        assert result.parse(json.dumps(found), version) == found
        result.addresses(found, "a")
        result.in_pod(found, "a")


@given(DOCUMENTS)
def test_an_error_is_one_or_is_none(text: str) -> None:
    refused = result.refusal(text)
    assert refused is None or isinstance(refused.words, str)


@given(
    st.lists(st.ip_addresses(), min_size=1, max_size=4),
    st.sampled_from(config.VERSIONS),
    st.sampled_from(config.VERSIONS),
)
def test_addresses_outlive_versions(
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address], one: str, two: str
) -> None:
    answer = json.dumps({"ips": [{"address": f"{item}/{item.max_prefixlen}"} for item in found]})
    there = result.convert(result.parse(answer, one), two)
    assert [item["address"] for item in result.addresses(result.convert(there, one), "eth0")] == [
        f"{item}/{item.max_prefixlen}" for item in found
    ]


@given(st.binary(max_size=60) | DOCUMENTS.map(str.encode))
def test_a_cached_file_is_an_attachment_or_none(data: bytes) -> None:
    found = cache.decode(data)
    assert found is None or cache.decode(cache.encode(found)) == found


@given(st.binary(max_size=20), st.dictionaries(st.text(max_size=3), st.integers()), st.text(max_size=9))
def test_an_attachment_is_had_again(text: bytes, capabilities: dict[str, Any], netns: str) -> None:
    attachment = cache.Attachment(
        container_id="c",
        network="n",
        interface="e",
        netns=netns,
        config=text,
        args=(("a", netns),),
        capabilities=capabilities,
    )
    assert cache.decode(cache.encode(attachment)) == attachment
