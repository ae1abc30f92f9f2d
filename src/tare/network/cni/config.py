"""CNI configuration: files in the configuration directory, and what each plugin of a list is told on its standard input.

    10-net.conflist   {"cniVersion", "name", "plugins": [{"type", "capabilities", …}, …]}
    10-net.conf       {"cniVersion", "name", "type", …}: a list of one; .json may be either
                      plugin's own keys ─► without capabilities ─► name, cniVersion, runtimeConfig, prevResult added

The file whose name comes first is the one; if it is no use that is an error, and the next is not taken in its stead. Pure but for
`first` and `load`. Source: CNI specification 1.1.0, sections 1 and 4.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tare.errors import FailedPrecondition

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")  # that are spoken, oldest first
CHECKED_SINCE, STATUS_SINCE, GC_SINCE = "0.4.0", "1.1.0", "1.1.0"
SUFFIXES = (".conf", ".conflist", ".json")
NAME = re.compile(r"[a-zA-Z0-9][-a-zA-Z0-9_.]*")
SPOKEN = f"Tare speaks {VERSIONS[0]} to {VERSIONS[-1]}"


class Malformed(FailedPrecondition):
    """A configuration that is no use."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A program's name, and what the file says to it."""

    type: str
    settings: Mapping[str, Any]

    @property
    def capabilities(self) -> frozenset[str]:
        """What it takes in its runtimeConfig."""
        return frozenset(name for name, wanted in self.settings.get("capabilities", {}).items() if wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkList:
    """A network: its plugins in the order of ADD. `versions` are those that it may be spoken in, best first; `source` is the file."""

    name: str
    versions: tuple[str, ...]
    plugins: tuple[Plugin, ...]
    source: str
    disable_check: bool = False
    disable_gc: bool = False
    inlined: bool = True

    @property
    def version(self) -> str:
        """The one that is spoken."""
        return self.versions[0]

    @property
    def capabilities(self) -> frozenset[str]:
        """What any of its plugins takes."""
        return frozenset().union(*(plugin.capabilities for plugin in self.plugins))


def since(version: str, first: str) -> bool:
    """Whether a version is that one or a later one."""
    return VERSIONS.index(version) >= VERSIONS.index(first)


def parse(text: bytes | str, source: str) -> NetworkList:
    """A list from a file's content, or from a single plugin's configuration. Raises Malformed."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise malformed(source, f"it is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise malformed(source, "it is not a JSON object")
    name = document.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise malformed(source, f"name is {shown(name)}, not letters, digits, dots, dashes and underscores")
    is_list = "plugins" in document or (source.endswith(".conflist") and "type" not in document)
    entries = document.get("plugins") if is_list else [document]
    if not isinstance(entries, list):
        raise malformed(source, "plugins is not a list")
    return NetworkList(
        name=name,
        versions=versions_of(document, source),
        plugins=tuple(plugin(entry, source) for entry in entries),
        source=source,
        disable_check=flag(document, "disableCheck", source),
        disable_gc=flag(document, "disableGC", source),
        inlined=not is_list or flag(document, "loadOnlyInlinedPlugins", source),
    )


def versions_of(document: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """Those of its versions that are spoken here, best first."""
    listed = document.get("cniVersions", [])
    if not isinstance(listed, list):
        raise malformed(source, "cniVersions is not a list")
    named = [document["cniVersion"], *listed] if "cniVersion" in document else listed
    if not named:
        raise malformed(source, f"it has no cniVersion; {SPOKEN}")
    spoken = [version for version in VERSIONS if version in named]
    if not spoken:
        raise malformed(source, f"its cniVersion is {', '.join(map(shown, named))}; {SPOKEN}")
    return tuple(reversed(spoken))


def plugin(entry: object, source: str) -> Plugin:
    """One entry of a list."""
    if not isinstance(entry, dict):
        raise malformed(source, "a plugin is not a JSON object")
    kind = entry.get("type")
    if not isinstance(kind, str) or not kind or "/" in kind or kind in (".", "..") or "\0" in kind:
        raise malformed(source, f"a plugin's type is {shown(kind)}, not the name of a program")
    capabilities = entry.get("capabilities", {})
    if not isinstance(capabilities, dict) or not all(isinstance(wanted, bool) for wanted in capabilities.values()):
        raise malformed(source, f"capabilities of plugin {kind} are not names with true or false")
    return Plugin(kind, entry)


def flag(document: Mapping[str, Any], key: str, source: str) -> bool:
    """A boolean, which some write as a string."""
    value = document.get(key, False)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise malformed(source, f"{key} is {shown(value)}, neither true nor false")
    return value


def negotiate(network: NetworkList, supported: Mapping[str, Iterable[str]]) -> NetworkList:
    """The list in the best version that all its plugins know. `supported` is what each type says of itself. Raises Malformed."""
    known = {kind: frozenset(versions) for kind, versions in supported.items()}
    for version in network.versions:
        if all(version in known[item.type] for item in network.plugins):
            return replace(network, versions=(version,))
    kind, versions = next((kind, known[kind]) for kind in known if network.version not in known[kind])
    raise malformed(
        network.source,
        f"plugin {kind} does not speak version {network.version}, but {', '.join(sorted(versions)) or 'none'}",
        hint=f"lower cniVersion, or bring a newer {kind}",
    )


def document(network: NetworkList) -> bytes:
    """The list as it is spoken, to be kept: parsed again it says the same, whatever becomes of the file."""
    value = {
        "cniVersion": network.version,
        "name": network.name,
        "disableCheck": network.disable_check,
        "disableGC": network.disable_gc,
        "loadOnlyInlinedPlugins": True,
        "plugins": [item.settings for item in network.plugins],
    }
    return json.dumps(value).encode()


def payload(
    network: NetworkList,
    item: Plugin,
    *,
    previous: Mapping[str, Any] | None = None,
    capabilities: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> bytes:
    """What a plugin reads on its standard input."""
    value = {key: entry for key, entry in item.settings.items() if key != "capabilities"}
    value |= {"name": network.name, "cniVersion": network.version, **(more or {})}
    wanted = {name: entry for name, entry in (capabilities or {}).items() if name in item.capabilities}
    if wanted:
        value["runtimeConfig"] = wanted
    if previous is not None:
        value["prevResult"] = previous
    return json.dumps(value).encode()


def malformed(source: str, cause: str, hint: str | None = None) -> Malformed:
    """The error for a file."""
    cure = "mend it or take it away: the first file by name is the one that counts"
    return Malformed(f"read CNI configuration {source}", cause=cause, hint=hint or cure)


def shown(value: object) -> str:
    """A value in a message."""
    return "missing" if value is None else json.dumps(value)[:80]


Stamp = tuple[tuple[str, int, int], ...]


def listing(directory: Path) -> Stamp:
    """The files that count, in order, and then those beside lists, each with what changes when it does. Raises OSError.

    None where there is no directory, or no list in it.
    """
    try:
        entries = sorted(path for path in directory.iterdir() if path.suffix in SUFFIXES)
    except FileNotFoundError:
        return ()
    found = [stamp for path in entries if (stamp := stamp_of(path, path.name)) is not None]
    if not found:
        return ()
    more = (stamp_of(path, f"{path.parent.name}/{path.name}") for path in sorted(directory.glob("*/*.conf")))
    return (*found, *filter(None, more))


def stamp_of(path: Path, name: str) -> tuple[str, int, int] | None:
    """A file's name, time and size; None where it is no file, or went meanwhile."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return (name, status.st_mtime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else None


def load(directory: Path, stamp: Sequence[tuple[str, int, int]]) -> NetworkList:
    """The first network of a directory that has files. Raises Malformed."""
    path = directory / stamp[0][0]
    try:
        network = parse(path.read_bytes(), str(path))
        more = () if network.inlined else tuple(beside(directory / network.name))
    except OSError as error:
        raise Malformed(f"read CNI configuration {path}", cause=error) from error
    network = replace(network, plugins=network.plugins + more)
    if not network.plugins:
        raise malformed(str(path), "it has no plugins")
    return network


def beside(directory: Path) -> Iterable[Plugin]:
    """Plugins that a list gets from files of their own, in a directory of the network's name."""
    for path in sorted(directory.glob("*.conf")):
        try:
            entry = json.loads(path.read_bytes())
        except ValueError as error:
            raise malformed(str(path), f"it is not JSON: {error}") from error
        yield plugin(entry, str(path))
