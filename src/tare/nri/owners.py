"""Who of the plugins has set what of a container: of two that set one thing the second is refused (pure).

A plugin that removes what another has set, or what was there, has that thing for itself from then on.
"""

from __future__ import annotations

from tare.errors import FailedPrecondition
from tare.nri.v1 import nri_pb2 as pb

REMOVED = "-"


class Conflict(FailedPrecondition):
    """Two plugins want one thing, each its own way."""


class Owners:
    """By container, thing and entry; entries are the keys of what has some (environment, mounts …), "" otherwise."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int, str], str] = {}

    def claim(self, container: str, thing: int, plugin: str, entry: str | None = None) -> None:
        """It is the plugin's. Raises Conflict."""
        key = (container, thing, entry or "")
        holder = self._held.get(key)
        if holder is not None and holder != REMOVED + plugin:
            name = pb.Field.Name(thing) + (f" {entry!r}" if entry is not None else "")
            other = holder.removeprefix(REMOVED)
            if other == plugin:
                raise Conflict(f"adjust container {container}", cause=f"plugin {plugin} sets {name} twice")
            cause = f"plugins {other} and {plugin} both set {name}"
            raise Conflict(f"adjust container {container}", cause=cause, hint="let one of them leave it alone")
        self._held[key] = plugin

    def add(self, container: str, thing: int, plugin: str) -> None:
        """It is the plugin's too: there may be several."""
        key = (container, thing, "")
        holders = [*filter(None, self._held.get(key, "").split(",")), plugin]
        self._held[key] = ",".join(dict.fromkeys(holders))

    def clear(self, container: str, thing: int, plugin: str, entry: str | None = None) -> None:
        """The plugin has removed it, whoever set it."""
        self._held[(container, thing, entry or "")] = REMOVED + plugin

    def holder(self, container: str, thing: int) -> str | None:
        """Who has set something that has no entries; None where nobody has."""
        holder = self._held.get((container, thing, ""))
        return None if holder is None or holder.startswith(REMOVED) else holder

    def holders(self, container: str, thing: int) -> dict[str, str]:
        """Who has set it, by entry."""
        return {
            entry: holder
            for (of, kind, entry), holder in self._held.items()
            if (of, kind) == (container, thing) and entry and not holder.startswith(REMOVED)
        }

    def message(self) -> pb.OwningPlugins:
        """All of it, as validators are shown it."""
        found = pb.OwningPlugins()
        for (container, thing, entry), holder in self._held.items():
            fields = found.owners[container]
            if entry:
                fields.compound[thing].owners[entry] = holder
            else:
                fields.simple[thing] = holder
        return found
