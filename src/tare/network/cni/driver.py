"""The network that pods get by CNI: which list is in force, who is attached, and deletions that failed.

    attach    list read anew if it has changed ─► held in state.db ─► ADD ─► result in the cache ─► addresses
    detach    DEL, as the list was at ADD ─► cache and state.db forget it
                 └─ fails: the pod goes on being taken down, and DEL is due: tried in the background until it works
    start     what belongs to no pod is due; GC, once a list is there; CHECK of the pods that live

state.db has what DEL needs, from before ADD on; the cache (`cache`) says the same to other tools. The loopback is not left to a plugin.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tare.config import NetworkConfig
from tare.errors import DeadlineExceeded, FailedPrecondition, InternalError, TareError, describe
from tare.network import inspection, rtnetlink
from tare.network.attach import Attachment
from tare.network.cni import arguments, cache, chain, config, result, template
from tare.network.cni.config import NetworkList
from tare.network.cni.plugins import Plugins, Runner, broken
from tare.network.netlink import Netlink
from tare.network.wishes import Wishes
from tare.state.database import Database

log = logging.getLogger(__name__)

INTERFACE = "eth0"
DELETE_SECONDS = 45.0  # for a pod that is stopped to wait; what takes longer goes on in the background
FIRST_PAUSE, LAST_PAUSE = 1.0, 60.0  # seconds between tries, doubled each time
LOOK_SECONDS = 10.0  # for a plugin to say how it is: whoever asks asks for the rest of the node too
STATUS_SECONDS = 5.0  # what plugins said of their status holds so long
NOTHING = "cni plugin not initialized"  # the words that operators of other runtimes look for


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A pod that is attached, or is going to be, or was: then DEL is `due`, has failed `tries` times, and `words` says why."""

    network: str
    netns: str
    config: str
    args: tuple[tuple[str, str], ...]
    capabilities: dict[str, Any]
    result: dict[str, Any] | None = None
    due: bool = False
    tries: int = 0
    words: str = ""

    def attachment(self, pod_id: str, netns: str) -> cache.Attachment:
        """As plugins and the cache have it."""
        return cache.Attachment(
            container_id=pod_id,
            network=self.network,
            interface=INTERFACE,
            netns=netns,
            config=self.config.encode(),
            args=self.args,
            capabilities=self.capabilities,
            result=self.result,
        )

    @property
    def list(self) -> NetworkList:
        """The list as it was at ADD."""
        return config.parse(self.config, f"{self.network}, as it was at ADD")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """The node's pod CIDRs, as the cluster gave them last."""

    ranges: tuple[str, ...] = field(default=())


class CniNetwork:
    """`database` is state.db. Where it is not `active`, pods get their network elsewhere, and those that this one gave are taken away."""

    def __init__(self, database: Database, settings: NetworkConfig, commands: Runner, *, active: bool = True) -> None:
        self._settings = settings
        self._active = active
        self._directory = Path(settings.conf_dir)
        self._cache = cache.Cache(Path(settings.cache_dir))
        self._chain = chain.Chain(Plugins(commands, settings.bin_dirs, settings.plugin_timeout))
        self._held = database.table("cni_attachments", Held)
        self._given = database.table("cni_ranges", Ranges)
        self._list: NetworkList | None = None
        self._trouble: str | None = f"{NOTHING}: its configuration was not looked at yet"
        self._status_at = float("-inf")
        self._gate = asyncio.Lock()  # no ADD while GC is told who is valid
        self._collected = not settings.gc
        self._busy: set[str] = set()  # pods whose DEL is under way
        self._recovered = False
        self._retry_at: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._failed_checks: dict[str, str] = {}

    async def setup(self) -> None:
        """See whether there is a network. Raises TareError."""
        await self._network()

    async def use_ranges(self, ranges: Sequence[str]) -> None:
        """Tell them to plugins that take ipRanges, and write the configuration where there is a template. Raises TareError."""
        self._given.put("node", Ranges(ranges=tuple(ranges)))
        if self._settings.conf_template:
            path = Path(self._settings.conf_template)
            other = await asyncio.to_thread(template.write, path, self._directory, ranges)
            if other is not None:
                log.info("%s is there already: none is made of %s", self._directory / other, path)

    # What there is

    async def look(self) -> None:
        """See anew whether pods can be attached: the configuration, its plugins, and what they say of themselves."""
        try:
            async with bounded("see whether pods can be attached", LOOK_SECONDS):
                network = await self._network()
                if time.monotonic() - self._status_at > STATUS_SECONDS:
                    await self._chain.status(network)
                    self._status_at = time.monotonic()
        except TareError as error:
            self._status_at = float("-inf")
            self._trouble = str(error)
        else:
            self._trouble = None

    def status(self) -> str | None:
        """Why no pod can be attached, as `look` found it, or None."""
        return self._trouble and f"Network plugin returns error: {self._trouble}"

    def describe(self) -> Mapping[str, object]:
        """The list in force, deletions that are due and why, and pods that did not pass their check."""
        network = self._list
        return {
            "mode": "cni",
            "configuration": network.source if network is not None else None,
            "network": network.name if network is not None else None,
            "cniVersion": network.version if network is not None else None,
            "plugins": [item.type for item in network.plugins] if network is not None else [],
            "deletionsDue": {pod_id: held.words for pod_id, held in self._held.items() if held.due},
            "failedChecks": dict(self._failed_checks),
        }

    async def _network(self) -> NetworkList:
        """The list in force. Raises TareError."""
        try:
            stamp = await asyncio.to_thread(config.listing, self._directory)
            if not stamp:
                raise FailedPrecondition(
                    NOTHING,
                    cause=f"there is no .conflist, .conf or .json in {self._directory}",
                    hint="has the cluster's network provider started? Without one: [network] mode = 'embedded'",
                )
            network = await self._chain.ready(await asyncio.to_thread(config.load, self._directory, stamp))
        except OSError as error:
            raise InternalError(f"read CNI configurations in {self._directory}", cause=error) from error
        if network != self._list:
            log.info("pods are attached to %s of %s, CNI %s", network.name, network.source, network.version)
            self._list, self._status_at = network, float("-inf")
        return network

    # Pods

    async def attach(self, pod_id: str, netns: int, netlink: socket.socket, wishes: Wishes | None = None) -> Attachment:
        """Put the pod on the network; what a failed attempt leaves, `detach` takes away. Raises TareError."""
        wishes = wishes or Wishes()
        if self._held.get(pod_id) is not None:
            raise FailedPrecondition(f"attach pod {pod_id}", cause="it is attached already, or was and DEL is due")
        network = await self._network()
        await self._collect(network)
        given = self._given.get("node") or Ranges()
        held = Held(
            network=network.name,
            netns=str(wishes.netns),
            config=config.document(network).decode(),
            args=arguments.cni_args(pod_id, wishes),
            capabilities=arguments.capabilities(pod_id, wishes, given.ranges, network.capabilities),
        )
        Netlink(netlink).run([rtnetlink.set_link("lo", up=True)])
        self._held.put(pod_id, held)
        added = dict(await self._chain.add(network, held.attachment(pod_id, held.netns)))
        held = replace(held, result=added)
        self._held.put(pod_id, held)
        with cache_errors(f"keep the result of attaching pod {pod_id}"):
            await asyncio.to_thread(self._cache.put, held.attachment(pod_id, held.netns))
        return attachment_of(added, network, pod_id)

    async def detach(self, pod_id: str) -> None:
        """Take the pod off the network; if that fails it is tried again in the background. Idempotent.

        Until `recover` it is left to the background altogether: a daemon that starts must not wait for one plugin after the other.
        """
        held = self._held.get(pod_id)
        if held is None or held.due or pod_id in self._busy:
            return
        if not self._recovered:
            self._held.put(pod_id, replace(held, due=True, words="left by an earlier daemon"))
            return
        await self._delete(pod_id, held)

    async def check(self, pod_id: str) -> None:
        """Have the plugins look at a pod. Raises TareError where something is not as it was made."""
        held = self._held.get(pod_id)
        if held is not None and held.result is not None and not held.due:
            await self._chain.check(held.list, held.attachment(pod_id, held.netns))

    def has(self, pod_id: str) -> bool:
        """Whether the pod is attached."""
        held = self._held.get(pod_id)
        return held is not None and not held.due

    async def path(self, pod_id: str, netns: str) -> Mapping[str, Any]:
        """A pod's way as the plugins have told it and as the kernel has it; `troubles` is what CHECK says."""
        held = self._held.get(pod_id)
        troubles = []
        try:
            await self.check(pod_id)
        except TareError as error:
            troubles.append(str(error))
        return await inspection.plugins_path(
            held.list.name if held is not None else "",
            [item.type for item in held.list.plugins] if held is not None else [],
            held.result if held is not None else None,
            netns,
            troubles,
        )

    def list(self) -> list[Mapping[str, Any]]:
        """The network of the list in force, and those that pods were given before. JSON-able, as `EmbeddedNetworks.list`."""
        pods: dict[str, dict[str, str]] = {}
        due: dict[str, dict[str, str]] = {}
        for pod_id, held in self._held.items():
            ips = [item["address"] for item in result.addresses(held.result or {}, INTERFACE)]
            pods.setdefault(held.network, {})
            if held.due:
                due.setdefault(held.network, {})[pod_id] = held.words
            else:
                pods[held.network][pod_id] = ", ".join(ips)
        network = self._list if self._active else None
        names = [*([network.name] if network is not None else []), *sorted(pods)]
        return [
            {
                "name": name,
                "mode": "cni",
                "state": "ready" if network is not None and name == network.name else "former",
                "source": network.source if network is not None and name == network.name else "",
                "pods": pods.get(name, {}),
                "deletionsDue": due.get(name, {}),
            }
            for name in dict.fromkeys(names)
        ]

    async def recover(self, pods: set[str]) -> None:
        """Have DEL done for what belongs to no pod of these, GC, and CHECK of the others: begun here, and gone on with in the background."""
        self._recovered = True
        for pod_id, held in self._held.items():
            if pod_id not in pods and not held.due:
                self._held.put(pod_id, replace(held, due=True, words="it belongs to no pod"))
        self._run_in_background(self._delete_due())
        if self._active:
            self._run_in_background(self._inspect())

    async def close(self) -> None:
        """Leave what is under way to the next daemon."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Deletions

    async def _delete(self, pod_id: str, held: Held) -> bool:
        """DEL, once; whether that worked. If not it is due."""
        self._busy.add(pod_id)
        try:
            netns = held.netns if await asyncio.to_thread(cache.lives, held.netns) else ""
            async with bounded(f"detach pod {pod_id}", DELETE_SECONDS):
                await self._chain.delete(held.list, held.attachment(pod_id, netns))
            with cache_errors(f"forget the result of attaching pod {pod_id}"):
                await asyncio.to_thread(self._cache.remove, held.network, pod_id, INTERFACE)
        except TareError as error:
            tries = held.tries + 1
            self._held.put(pod_id, replace(held, due=True, tries=tries, words=str(error)))
            pause = min(LAST_PAUSE, FIRST_PAUSE * 2 ** min(tries - 1, 10))
            self._retry_at[pod_id] = time.monotonic() + pause
            log.warning("%s; the pod is taken down without it, and DEL is tried again in %g s", describe(error), pause)
            self._wake.set()
            return False
        finally:
            self._busy.discard(pod_id)
        self._held.delete(pod_id)
        self._retry_at.pop(pod_id, None)
        self._failed_checks.pop(pod_id, None)
        return True

    async def _delete_due(self) -> None:
        """For ever: what is due, when its time has come."""
        while True:
            self._wake.clear()
            due = {pod_id: held for pod_id, held in self._held.items() if held.due and pod_id not in self._busy}
            for pod_id, held in due.items():
                if self._retry_at.get(pod_id, 0.0) > time.monotonic():
                    continue
                try:
                    if await self._delete(pod_id, held):
                        log.info("pod %s, which is gone, is detached from network %s now", pod_id, held.network)
                except Exception as error:  # noqa: BLE001 - a full disk, for one, must not end the tries
                    self._retry_at[pod_id] = time.monotonic() + LAST_PAUSE
                    log.warning("detach pod %s: %s", pod_id, describe(error))
            times = [self._retry_at[pod_id] for pod_id in due if pod_id in self._retry_at]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(times) - time.monotonic()) if times else None):
                    await self._wake.wait()

    # At start

    async def _inspect(self) -> None:
        """GC where there is a list already, and CHECK of those who live."""
        with contextlib.suppress(TareError):  # `setup` has said so
            network = await self._network()
            await self._collect(network)
        for pod_id, held in self._held.items():
            if held.due or not await asyncio.to_thread(cache.lives, held.netns):
                continue
            try:
                await self.check(pod_id)
            except TareError as error:
                self._failed_checks[pod_id] = str(error)
                log.warning("%s", describe(error))

    async def _collect(self, network: NetworkList) -> None:
        """GC, once in a daemon's life. Valid is whoever's cached attachment has a live namespace, or none that is known, and what is held here."""
        async with self._gate:
            if self._collected:
                return
            self._collected = True
            try:
                cached = await asyncio.to_thread(self._cache.all, network.name)
            except OSError as error:
                log.warning(
                    "nothing is collected, because the cache of CNI results cannot be read: %s", describe(error)
                )
                return
            valid = {(pod_id, INTERFACE) for pod_id, held in self._held.items() if not held.due}
            for item in cached:
                if not item.netns or await asyncio.to_thread(cache.lives, item.netns):
                    valid.add((item.container_id, item.interface))
            for failure in await self._chain.collect(network, sorted(valid)):
                log.warning("%s", describe(failure))

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            log.error("CNI's work in the background: %s", describe(failure), exc_info=failure)


def attachment_of(added: Mapping[str, Any], network: NetworkList, pod_id: str) -> Attachment:
    """What the runtime wants to know of a result. Raises InternalError where the pod has no address."""
    found = result.addresses(added, INTERFACE)
    if not found:
        cause = f"the result of the last plugin has no address of {INTERFACE} in the pod"
        raise broken(f"attach pod {pod_id}: network {network.name}", network.plugins[-1].type, "ADD", cause)
    interface = result.in_pod(added, INTERFACE) or {}
    return Attachment(
        ips=tuple(dict.fromkeys(item["address"].partition("/")[0] for item in found)),
        interface=INTERFACE,
        mac=interface.get("mac", ""),
        host_interface="",
        gateway=found[0].get("gateway", ""),
    )


@contextlib.contextmanager
def cache_errors(doing: str) -> Iterator[None]:
    """The disk's errors in the family's words."""
    try:
        yield
    except OSError as error:
        raise InternalError(doing, cause=error, hint="[network] cache_dir is where results are kept") from error


@contextlib.asynccontextmanager
async def bounded(doing: str, seconds: float) -> AsyncIterator[None]:
    """Raise DeadlineExceeded where plugins take too long."""
    bound = asyncio.timeout(seconds)
    try:
        async with bound:
            yield
    except TimeoutError:
        if not bound.expired():
            raise
        raise DeadlineExceeded(doing, cause=f"the plugins came to no end within {seconds:g} s") from None
