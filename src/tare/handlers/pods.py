"""A pod's namespaces: made by a child of the launcher, pinned as files under pods/<id>/, and let go of again."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from tare.errors import InternalError
from tare.handlers.commands import SendPlan
from tare.handlers.pins import PIN_FLAGS, PROC_PIN, find_first, unpin, unpin_proc
from tare.handlers.plans import Mappings
from tare.handlers.processes import Process
from tare.launch import mounts, packets, plan, wire


@dataclass(frozen=True, slots=True, kw_only=True)
class PodNamespaces:
    """`pins` are files that hold the namespaces, by kind; `netlink` lives in a new network namespace; `pause` is a shared PID namespace's PID 1."""

    pins: dict[str, Path]
    netlink: socket.socket | None
    pause: Process | None


class Pods:
    """Makes and removes them. `abandon` gives up a request by its name, `end` kills a process and forgets it."""

    def __init__(
        self,
        run: Path,
        send: SendPlan,
        abandon: Callable[[bytes], Awaitable[None]],
        end: Callable[[Process], Awaitable[None]],
    ) -> None:
        self._run = run
        self._send = send
        self._abandon = abandon
        self._end = end

    async def make(
        self,
        pod_id: str,
        *,
        kinds: frozenset[str],
        hostname: str,
        sysctls: dict[str, str],
        mappings: Mappings | None = None,
    ) -> PodNamespaces:
        """New namespaces, pinned. With "pid" their PID 1 stays, to reap. With "user" the others are owned by one that has these mappings."""
        directory = self._run / "pods" / pod_id
        pins = {kind: directory / kind for kind in sorted(kinds)}
        steps: list[plan.Step] = []
        if "uts" in kinds and hostname:
            steps.append(("hostname", "set the host name", hostname.encode()))
        for name, value in sysctls.items():
            file = "/proc/sys/" + name.replace(".", "/")
            steps.append(("write_file", f"set sysctl {name}", file.encode(), value.encode()))
        work: plan.Plan = {
            "steps": steps,
            "pins": [(kind.encode(), bytes(path)) for kind, path in pins.items()],
            "network": "net" in kinds,
            "stay": "pid" in kinds,
            "proc": bytes(directory / PROC_PIN) if needs_proc(kinds) else b"",
        }
        if "user" in kinds:
            work |= owner(mappings)
        flags = sum(PIN_FLAGS[kind] for kind in kinds)
        doing = f"make the namespaces of pod {pod_id}"
        fields, fds = await self._send(wire.NAMESPACES, (pod_id.encode(), flags), work, (), doing, 0.0)
        netlink = socket.socket(fileno=fds.pop(0)) if fds else None
        packets.close_all(fds)
        pid, start = (int(field) for field in fields)
        return PodNamespaces(pins=pins, netlink=netlink, pause=Process(pid, start) if pid else None)

    async def remove(self, pod_id: str, pause: Process | None) -> None:
        """Let the namespaces go: PID 1 is ended, the pins are unmounted and removed. Idempotent."""
        await self._abandon(pod_id.encode())
        directory = self._run / "pods" / pod_id
        pin = directory / "pid"
        first = pause or (await asyncio.to_thread(find_first, pin) if os.path.ismount(pin) else None)
        if first is not None:
            await self._end(first)
        for kind in PIN_FLAGS:
            unpin(directory / kind)
        unpin_proc(directory / PROC_PIN)


def needs_proc(kinds: frozenset[str]) -> bool:
    """Whether containers of a pod will want a /proc from outside of its PID namespace (`compile.is_apart`), and the kernel makes none."""
    return "pid" in kinds and "user" not in kinds and not mounts.shows_other_pids()


def owner(mappings: Mappings | None) -> plan.Plan:
    """What the plan has for a user namespace that owns the others: its maps, and of a PID 1 that stays the last IDs, which nobody uses."""
    if mappings is None:
        raise InternalError("make a user namespace", cause="it has no mappings")
    nobody = tuple(max(first + count - 1 for first, _, count in part) for part in (mappings.uid, mappings.gid))
    return {"uids": mappings.uid, "gids": mappings.gid, "nobody": nobody}
