"""The plugins that are connected, as one (`runtime.plugins.Plugins`): who is asked what, in which order, and what comes of it.

    a request      one at a time: each plugin in the order of index and name, each seeing what those before it have adjusted
    an answer      adjustments of what is being made go back to who asked; updates and evictions of other containers are done first
    a new plugin   is shown all that there is while no request is made, and nothing is between its request and its record: so it
                   hears of each container exactly once

    connected ─► registered ─► configured ─► synchronized ─► asked … ─► gone (hung up, too slow, not NRI, the daemon's end)

A plugin never has the daemon wait for longer than its time, and what it wants of other containers is done under those containers' own locks
while the request's turn is over, so that two requests never wait for each other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from tare.errors import TareError, describe
from tare.nri import adjust, limits, validator, view
from tare.nri.front import Front
from tare.nri.interface import METHODS
from tare.nri.merge import Change, Creation, Updates
from tare.nri.owners import Owners
from tare.nri.peer import Peer, PluginFailed
from tare.nri.v1 import nri_pb2 as pb
from tare.runtime import plugins
from tare.runtime.plugins import Adjusted, Moment, Subject
from tare.runtime.records import ContainerState, Resources

log = logging.getLogger(__name__)
T = TypeVar("T")

MOST_UNASKED = 16  # requests of plugins that are carried out at one time
END_SECONDS = 5.0  # for what plugins wanted of containers to be done when the daemon ends


class Hub:
    """`front` knows the settings, what there is, and what is on its way."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._settings = front.settings
        self._store = front.store
        self._peers: list[Peer] = []
        self._turn = asyncio.Lock()
        self._stopped: set[str] = set()
        self._errands: set[asyncio.Task[Any]] = set()
        self._unasked = asyncio.Semaphore(MOST_UNASKED)

    # Plugins come and go

    def peer(self) -> Peer:
        """One that is about to connect."""
        return Peer(self._settings, self._update_unasked, self._gone)

    async def join(self, peer: Peer) -> None:
        """A plugin that is configured takes part. Raises TareError; it is gone then."""
        try:
            async with self._front.quiet(), self._turn:
                pods, containers = self._all()
                updates = await peer.synchronize(pods, containers)
                self._peers = sorted([*self._peers, peer], key=lambda item: (item.index, item.name))
                self._look()
        except BaseException:
            peer.close()
            raise
        log.info("NRI plugin %s is connected; they are asked in this order: %s", peer.title, ", ".join(self.titles()))
        found = Updates(Owners())
        found.add(updates, peer.title)
        await asyncio.shield(self._errand(self._carry_out(found)))

    def titles(self) -> list[str]:
        """The plugins, in their order."""
        return [peer.title for peer in self._peers]

    def _gone(self, peer: Peer) -> None:
        if peer in self._peers:
            self._peers.remove(peer)
            log.info("NRI plugin %s is gone", peer.title)
            self._look()

    def _look(self) -> None:
        self._front.active = bool(self._peers) or self._settings.default_validator.enable
        if not self._peers:
            self._stopped.clear()

    def _all(self) -> tuple[list[pb.PodSandbox], list[pb.Container]]:
        store = self._store
        pods = [view.pod(record, store.pod_facts.get(record.id)) for record in store.pods.values()]
        records = [record for record in store.containers.values() if record.state is not ContainerState.EXITED]
        return pods, [view.container(plugins.of_container(store, record)) for record in records]

    async def close(self) -> None:
        """Tell the plugins that this is the end."""
        peers, self._peers = self._peers, []
        await asyncio.gather(*(peer.shut_down() for peer in peers))
        if self._errands:
            await asyncio.wait(self._errands, timeout=END_SECONDS)

    # Requests

    async def ask(
        self, moment: Moment, subject: Subject, wanted: Resources | None = None, overhead: Resources | None = None
    ) -> None:
        """As `Plugins.ask`."""
        request = message(moment, subject, wanted, overhead)
        async with self._turn:
            for peer in list(self._peers):
                await peer.ask(moment.value, request, METHODS[moment.value].response)

    async def tell(self, moment: Moment, subject: Subject) -> None:
        """As `Plugins.tell`; those after a plugin that fails are told all the same. A pod's end is told once, however often it is tried."""
        if moment is Moment.STOP_POD and subject.pod.id in self._stopped:
            return
        request = message(moment, subject)
        found = Updates(Owners())
        async with self._turn:
            for peer in list(self._peers):
                try:
                    answer = await peer.ask(moment.value, request, METHODS[moment.value].response)
                    if isinstance(answer, pb.StopContainerResponse):
                        found.add(answer.update, peer.title)
                except TareError as error:
                    log.warning("%s", describe(error))
        if moment is Moment.STOP_POD:
            self._stopped.add(subject.pod.id)
        elif moment is Moment.REMOVE_POD:
            self._stopped.discard(subject.pod.id)
        await self._carry_out(found)

    def ended(self, subject: Subject) -> None:
        """As `Plugins.ended`."""
        self._errand(self.tell(Moment.STOPPED, subject))

    async def adjust(self, subject: Subject, cgroup: str) -> Adjusted | None:
        """As `Plugins.adjust`."""
        record = subject.container
        assert record is not None
        shown, pod = view.container(subject), view.pod(subject.pod, subject.facts)
        before = pb.Container.FromString(shown.SerializeToString())
        creation = Creation(pb.CreateContainerRequest(pod=pod, container=shown))
        asked = []
        async with self._turn:
            for peer in list(self._peers):
                answer = await peer.ask("CreateContainer", creation.request, pb.CreateContainerResponse)
                if answer is not None:
                    creation.add(answer, peer.title)
                if not peer.closed:  # one that was lost over this has not had its say, and may be one that must
                    asked.append((peer.index, peer.name))
            validator.check(self._settings.default_validator, pod, before, creation.owners, asked)
            await self._validate(pod, before, creation, asked)
        await self._carry_out(creation.updates)
        if not creation.adjusts:
            return None
        return adjust.adjusted(dict(subject.spec), creation.adjust, record.resources, cgroup)

    async def _validate(
        self, pod: pb.PodSandbox, before: pb.Container, creation: Creation, asked: Sequence[tuple[str, str]]
    ) -> None:
        """Every validator agrees, or PluginFailed is raised: also by one that is lost over this, for its word is missing."""
        name = "ValidateContainerAdjustment"
        peers = [peer for peer in self._peers if peer.wants(name)]
        if not peers:
            return
        request = pb.ValidateContainerAdjustmentRequest(
            pod=pod,
            container=before,
            adjust=creation.adjust,
            update=creation.updates.found.values(),
            owners=creation.owners.message(),
            plugins=[pb.PluginInstance(index=index, name=own) for index, own in asked],
        )
        response = pb.ValidateContainerAdjustmentResponse
        answers = await asyncio.gather(*(peer.ask(name, request, response) for peer in peers), return_exceptions=True)
        for peer, answer in zip(peers, answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            doing = f"make container {before.name}"
            if answer is None:
                raise PluginFailed(doing, cause=f"validator {peer.title} did not answer")
            if answer.reject:
                cause = f"validator {peer.title} rejects its adjustment: {answer.reason or 'it does not say why'}"
                raise PluginFailed(doing, cause=cause)

    async def change(self, subject: Subject, wanted: Resources) -> Resources:
        """As `Plugins.change`."""
        request = pb.UpdateContainerRequest(
            pod=view.pod(subject.pod, subject.facts),
            container=view.container(subject),
            linux_resources=limits.message(wanted),
        )
        change = Change(request)
        async with self._turn:
            for peer in list(self._peers):
                answer = await peer.ask("UpdateContainer", request, pb.UpdateContainerResponse)
                if answer is not None:
                    change.add(answer, peer.title)
        await self._carry_out(change.updates, but=thing_of(subject))
        return (
            wanted
            if change.limits is None
            else limits.with_score(limits.of_update(change.limits), wanted.oom_score_adj)
        )

    # What they want of other containers

    async def _update_unasked(self, peer: Peer, request: pb.UpdateContainersRequest) -> pb.UpdateContainersResponse:
        log.info(
            "NRI plugin %s asks for updates of %d containers", peer.title, len(request.update) + len(request.evict)
        )
        found = Updates(Owners())
        found.add(request.update, peer.title)
        found.evict(request.evict, peer.title)
        await self._unasked.acquire()
        errand = self._errand(self._carry_out(found))  # which goes on where the plugin hangs up, or gives it less time
        errand.add_done_callback(lambda _: self._unasked.release())
        return pb.UpdateContainersResponse(failed=await asyncio.shield(errand))

    async def _carry_out(self, found: Updates, but: str = "") -> list[pb.ContainerUpdate]:
        """Evict and update; what could not be updated is logged and returned, but where that is to be passed over.

        `but` is whose lock the caller has: its eviction has to wait for that.
        """
        evictions = {key: self._evict(key, *why) for key, why in found.evicted.items() if key in self._store.containers}
        if but in evictions:
            self._errand(evictions.pop(but))
        await asyncio.gather(*evictions.values())
        failed = []
        for update in found.found.values():
            try:
                await self._update(update)
            except TareError as error:
                log.warning(
                    "container %s was not updated as NRI plugins want it: %s", update.container_id, describe(error)
                )
                if not update.ignore_failure:
                    failed.append(update)
        return failed

    async def _update(self, update: pb.ContainerUpdate) -> None:
        if self._front.containers is None or update.container_id not in self._store.containers:
            return  # it has gone meanwhile
        wanted = limits.of_update(update.linux.resources)
        await self._front.containers.limit_container(update.container_id, wanted)

    async def _evict(self, container: str, plugin: str, reason: str) -> None:
        log.warning("container %s is evicted by NRI plugin %s: %s", container, plugin, reason or "it does not say why")
        try:
            if self._front.containers is not None:
                await self._front.containers.stop_container(container, 0.0)
        except TareError as error:
            log.warning("container %s could not be evicted: %s", container, describe(error))

    def _errand(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
        return task


def thing_of(subject: Subject) -> str:
    """The ID of what it is about."""
    return subject.container.id if subject.container is not None else subject.pod.id


def message(
    moment: Moment, subject: Subject, wanted: Resources | None = None, overhead: Resources | None = None
) -> Message:
    """The request of a moment."""
    kind: Any = METHODS[moment.value].request
    request = kind(pod=view.pod(subject.pod, subject.facts))
    if subject.container is not None:
        request.container.CopyFrom(view.container(subject))
    if wanted is not None:
        request.linux_resources.CopyFrom(limits.message(wanted))
    if overhead is not None:
        request.overhead_linux_resources.CopyFrom(limits.message(overhead))
    assert isinstance(request, Message)
    return request
