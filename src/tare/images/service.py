"""The ImageService: what the rest of Tare asks about images. Pulling is `pull.py`, what is kept is `store.py`.

A pull that has begun goes on when its caller leaves; the next one for the same image finds what it has done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tare.config import POLICY, ImagesConfig
from tare.errors import TareError
from tare.handlers.commands import Commands
from tare.images import names, platform
from tare.images.archive import Found
from tare.images.auth import RegistryAuth
from tare.images.errors import explain
from tare.images.importing import LOAD_IMAGE, Absent, Load
from tare.images.pull import PULL_IMAGE, Pull
from tare.images.records import ImageConfig, ImageRecord, Usage
from tare.images.reference import Reference, parse
from tare.images.registries import Registries
from tare.images.registry import Registry
from tare.images.store import COLLECT, ImageStore
from tare.images.transport import Patience
from tare.images.trust import Trust
from tare.images.unpack import Limits
from tare.images.workers import Workers
from tare.state.database import Database
from tare.state.operations import Operation, Operations, Step
from tare.storage.overlay import Snapshots

__all__ = ["ImageConfig", "ImageRecord", "ImageService", "RegistryAuth", "Usage"]

log = logging.getLogger(__name__)

IO_THREADS = 4
KUBELET_SECONDS = 600.0


NAMELESS = Reference("archive.invalid", "image", "latest")


def ignore(pull: Pull) -> None:
    """Nobody watches."""


class ImageService:
    """Images under one root directory. `in_use` gives the chain IDs of layers that containers stand on, `commands` runs credential helpers."""

    def __init__(
        self,
        database: Database,
        operations: Operations,
        root: Path,
        config: ImagesConfig,
        in_use: Callable[[], set[str]],
        patience: Patience | None = None,
        commands: Commands | None = None,
    ) -> None:
        self.operations = operations
        self.config = config
        self.patience = patience or Patience(
            progress=config.progress_timeout, min_rate=config.min_rate, range_size=config.range_size
        )
        self.platform = platform.local()
        self.executor = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="images-io")
        self.store = ImageStore(database, root, config, operations, in_use=in_use, executor=self.executor)
        limits = Limits(config.max_layer_size, config.max_layer_entries)
        self.workers = Workers(self.store, Path(config.decryption_keys_dir), limits)
        optional = config.policy == POLICY
        self.trust = Trust(Path(config.policy), optional=optional, database=database)
        self.registries = Registries(config, self.patience, self.executor, commands)
        self._pulls: set[asyncio.Task[ImageRecord]] = set()
        self._snapshots = Snapshots(root)
        self._asked_at = float("-inf")

    def list(self) -> list[ImageRecord]:
        """All images."""
        return sorted(self.store.images().values(), key=lambda image: (image.repo_tags or ("~",), image.id))

    def find(self, reference: str) -> ImageRecord | None:
        """The image of that tag, digest, ID or unique beginning of an ID. Raises InvalidArgument for what is none of these."""
        return names.find(self.store.images(), reference)

    async def pull(
        self, reference: str, auth: RegistryAuth | None, watch: Callable[[Pull], None] = ignore
    ) -> ImageRecord:
        """The image, whole on the disk and recorded under the name, as its registry has it now and lets `auth` have it.

        `watch` is given the pull when it begins. Raises MalformedReference (InvalidArgument) or a PullError; nothing of a failed
        pull stays.
        """
        task = asyncio.create_task(self._pull(parse(reference), auth, watch))
        self._pulls.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[ImageRecord]) -> None:
        self._pulls.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s", error)

    async def _pull(
        self, reference: Reference, auth: RegistryAuth | None, watch: Callable[[Pull], None]
    ) -> ImageRecord:
        started = time.monotonic()
        pull: Pull | None = None
        try:
            pull = self.subject(reference, await self.registries.of(reference, auth))
            watch(pull)
            await self.operations.run(PULL_IMAGE, pull, {"reference": str(reference)})
        except (TareError, OSError) as error:
            raise explain(str(reference), error) from error
        finally:
            if pull is not None:
                pull.release()
        if not self.config.keep_blobs:
            await self.store.collect()
        assert pull.image is not None
        seconds = time.monotonic() - started
        log.info("pulled %s: %s, %d layers, in %.1f s", reference, pull.image.id, len(pull.image.chain_ids), seconds)
        return pull.image

    def subject(self, reference: Reference, registry: Registry) -> Pull:
        """What the operation works on."""
        return Pull(reference, registry, self.workers, self.platform, self.config.parallel_layers, self.trust)

    async def remove(self, reference: str) -> None:
        """Remove the image with all its names, and what only it needed. Nothing happens where there is none. Raises InvalidArgument."""
        image = self.find(reference)
        if image is None:
            return
        removal = Removal(self, image.id, image.created_at)
        await self.operations.run(REMOVE_IMAGE, removal, removal.names)

    async def collect(self) -> None:
        """Remove layers and blobs that no image, no pull and no container needs, and signatures of what is not here."""
        self.trust.prune(self.store.images().values())
        await self.store.collect()

    async def check_trust(self, image: ImageRecord, asked: str) -> None:
        """Does the policy, as it is now, let a container have this image, asked for by that name? Raises SignatureValidationFailed."""
        await self.trust.check(image, asked)

    async def make_room(self) -> tuple[str, ...]:
        """Where the disk is fuller than the settings allow, remove images that were not used for longest; returns their IDs.

        While a kubelet is served images with a tag are left to it: it has a collection of its own, and counts on what it has pulled.
        """
        return tuple(await self.store.make_room(tagged_too=not self.kubelet_served()))

    def kubelet_served(self) -> bool:
        """Has a client asked for the usage of file systems lately? Kubelets do so every ten seconds or so, to decide what to evict."""
        return time.monotonic() - self._asked_at < KUBELET_SECONDS

    async def filesystems(self) -> tuple[Usage, Usage]:
        """What images and what the writable layers of containers take on the disk."""
        self._asked_at = time.monotonic()
        written = await self._snapshots.total()
        return self.store.usage(), Usage(path=self.store.usage().path, bytes=written.bytes, inodes=written.inodes)

    def backlog(self) -> dict[str, int]:
        """How much waits for a thread, by what is to be done."""
        return {"images-io": self.executor._work_queue.qsize(), "images-unpack": self.workers.backlog}

    def usage(self) -> Usage:
        """What images take on the disk."""
        return self.store.usage()

    def layer_paths(self, image: ImageRecord) -> tuple[Path, ...]:
        """The directories of an image's layers, TOP first, as overlayfs takes lower directories."""
        self.store.used(image)
        return tuple(self.store.layers.path(chain_id) for chain_id in reversed(image.chain_ids))

    async def recover(self) -> None:
        """Undo what the last process had under way, and make disk and records agree. Before the first pull."""
        await self.store.recover()
        await self.operations.recover(PULL_IMAGE, self._restored)
        await self.operations.recover(LOAD_IMAGE, self._restored_load)
        await self.operations.recover(REMOVE_IMAGE, partial(restored_removal, self))
        await self.operations.recover(COLLECT, lambda names: self.store)
        await self.store.sweep()

    def _restored(self, subject: Mapping[str, str]) -> Pull:
        """The subject of a pull of an earlier process: enough to undo it."""
        reference = parse(subject["reference"])
        registry = Registry(reference, (), self.patience, self.config.max_manifest_size, self.executor)
        return self.subject(reference, registry)

    def _restored_load(self, subject: Mapping[str, str]) -> Load:
        return self.loading(Found(subject["digest"], ()))

    def loading(self, found: Found) -> Load:
        """The subject of loading one image of an archive whose blobs are in the store."""
        reference = found.names[0] if found.names else NAMELESS
        return Load(
            reference,
            Absent(reference, self.executor),
            self.workers,
            self.platform,
            self.config.parallel_layers,
            self.trust,
            digest=found.digest,
            names=found.names,
            genuine=found.genuine,
        )

    async def close(self) -> None:
        """End pulls that are under way, undoing them, and all threads. What has come of a blob stays for the next process."""
        self.store.content.suspend()
        for task in self._pulls:
            task.cancel()
        if self._pulls:
            await asyncio.wait(self._pulls)
        await self.registries.close()
        self.workers.close()
        self.executor.shutdown()


@dataclass(frozen=True, slots=True)
class Removal:
    """An image that is being removed, `created_at` in ns since the epoch: one that was pulled again since is another."""

    service: ImageService
    id: str
    created_at: int

    @property
    def names(self) -> dict[str, str]:
        """What recovery finds it by."""
        return {"image": self.id, "created": str(self.created_at)}

    async def drop(self) -> None:
        """The image is no more."""
        image = self.service.store.images().get(self.id)
        if image is not None and image.created_at == self.created_at:
            self.service.store.drop(self.id)

    async def collect(self) -> None:
        """Nor what it alone needed."""
        await self.service.collect()


REMOVE_IMAGE: Operation[Removal] = Operation(
    "RemoveImage", (Step("record", Removal.drop), Step("collect", Removal.collect)), finish=True
)


def restored_removal(service: ImageService, names: Mapping[str, str]) -> Removal:
    """The removal that an intent speaks of."""
    return Removal(service, names["image"], int(names["created"]))
