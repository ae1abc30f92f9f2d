"""What a CNI plugin answers: a result, an error, or something that is neither. Pure.

    exit 0   a result   {"cniVersion", "interfaces": [{"name", "mac", "sandbox"}], "ips": [{"address", "gateway", "interface": 0}], "routes", "dns"}
    other    an error   {"cniVersion", "code", "msg", "details"}

A result is kept in the version of the list that it is for: before 1.0.0 an address also says of which family it is, and 1.1.0 brought
fields that those before do not know. Source: CNI specification 1.1.0, section 5; 0.4.0 for the older form.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tare.network.cni.config import VERSIONS, since

QUOTED = 300  # characters of what a plugin said that a message shows
NEWER_INTERFACE = ("mtu", "socketPath", "pciID")
NEWER_ROUTE = ("mtu", "advmss", "priority", "table", "scope")
CODES = {
    1: "it does not speak this version of CNI",
    2: "it does not know a field of its configuration",
    3: "it does not know the container",
    4: "the environment that it was given is not valid",
    5: "input or output failed",
    6: "it could not read its configuration",
    7: "its configuration is not valid",
    11: "it asks to be tried again later",
    50: "it is not available",
    51: "it is not available, and pods that are there may be cut off",
}


class NoResult(ValueError):
    """What a plugin printed is no result; the message says why not."""


class Refusal(NamedTuple):
    """A plugin's error."""

    code: int
    words: str


def parse(output: str, version: str) -> dict[str, Any]:
    """A result in the form of a version. Raises NoResult."""
    if not output.strip():
        raise NoResult("it ended with 0 and printed no result")
    try:
        document = json.loads(output)
    except (ValueError, RecursionError) as error:
        raise NoResult(f"what it printed is not JSON: {quoted(output)}") from error
    if not isinstance(document, dict):
        raise NoResult(f"what it printed is not a JSON object: {quoted(output)}")
    document = present(document)
    if "msg" in document and "ips" not in document and "interfaces" not in document:
        raise NoResult(f"it ended with 0 and printed an error: {quoted(output)}")
    check(document)
    said = document.get("cniVersion") or version
    if said not in VERSIONS:
        raise NoResult(f"its result is of version {said}, and {version} was asked for")
    return convert(document, version)


def present(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document without what is null in it, or in an object of a list of its own: that is as good as absent."""
    value = without_null(document)
    for key, entry in value.items():
        if isinstance(entry, list):
            value[key] = [without_null(item) if isinstance(item, dict) else item for item in entry]
    return value


def without_null(item: Mapping[str, Any]) -> dict[str, Any]:
    """The members of an object that are not null."""
    return {key: entry for key, entry in item.items() if entry is not None}


def check(document: Mapping[str, Any]) -> None:
    """Whether it has a result's shape. Raises NoResult."""
    interfaces, ips = entries(document, "interfaces"), entries(document, "ips")
    entries(document, "routes")
    for interface in interfaces:
        if not isinstance(interface.get("name"), str):
            raise NoResult("its result has an interface without a name")
    for ip in ips:
        try:
            ipaddress.ip_interface(str(ip.get("address")))
        except ValueError as error:
            raise NoResult(f"its result has an address that is none: {error}") from error
        index = ip.get("interface")
        if index is not None and not (type(index) is int and 0 <= index < len(interfaces)):
            raise NoResult(f"its result has an address of interface {index!r}, which is not in it")
    for key in ("mac", "sandbox"):
        if not all(isinstance(item.get(key, ""), str) for item in interfaces):
            raise NoResult(f"its result has an interface whose {key} is not a string")
    if not all(isinstance(item.get("gateway", ""), str) for item in ips):
        raise NoResult("its result has a gateway that is not a string")


def entries(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects, which may be missing."""
    found = document.get(key) or []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise NoResult(f"its result's {key} is not a list of objects")
    return found


def convert(document: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The same in the form of another version; what that does not know is left out."""
    value = {**document, "cniVersion": version}
    old, newest = not since(version, "1.0.0"), since(version, "1.1.0")
    if document.get("ips"):
        value["ips"] = [address(item, old) for item in document["ips"]]
    for key, newer in (("interfaces", NEWER_INTERFACE), ("routes", NEWER_ROUTE)):
        if document.get(key) and not newest:
            value[key] = [{name: entry for name, entry in item.items() if name not in newer} for item in document[key]]
    return value


def address(item: Mapping[str, Any], old: bool) -> dict[str, Any]:
    """One of a result's addresses in the old form, with its family, or the new one."""
    bare = {key: entry for key, entry in item.items() if key != "version"}
    family = ipaddress.ip_interface(item["address"]).version
    return {"version": str(family), **bare} if old else bare


def in_pod(document: Mapping[str, Any], interface: str) -> dict[str, Any] | None:
    """The pod's interface of that name, as the result has it."""
    for item in document.get("interfaces") or []:
        if item["name"] == interface and item.get("sandbox"):
            return dict(item)
    return None


def addresses(document: Mapping[str, Any], interface: str) -> list[dict[str, Any]]:
    """Those of the pod's interface, in the result's order; an address that names no interface is the pod's."""
    interfaces = document.get("interfaces") or []
    found = []
    for item in document.get("ips") or []:
        index = item.get("interface")
        owner = interfaces[index] if index is not None else None
        if owner is None or (owner["name"] == interface and owner.get("sandbox")):
            found.append(item)
    return found


def refusal(output: str) -> Refusal | None:
    """The error that a plugin printed, or None where it is none."""
    try:
        document = json.loads(output)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or not isinstance(document.get("msg"), str):
        return None
    code = document.get("code")
    code = code if type(code) is int else 0
    words = "; ".join(
        filter(None, (shown(document["msg"]), shown(str(document.get("details") or "")), CODES.get(code, "")))
    )
    return Refusal(code, f"{words} (code {code})" if code else words)


def quoted(output: str) -> str:
    """The beginning of what a plugin printed."""
    return repr(beginning(output))


def shown(words: str) -> str:
    """The beginning of a plugin's own words, quoted where they are not one line of text."""
    text = beginning(words)
    return text if text.isprintable() else repr(text)


def beginning(text: str) -> str:
    """As much of a text as a message shows."""
    text = text.strip()
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}…"
