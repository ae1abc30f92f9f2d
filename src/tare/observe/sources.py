"""Where the gauges look: parts of the daemon, and what waits in them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tare.cri.dispatch import Lasting
from tare.handlers.builtin import BuiltinHandler
from tare.images.service import ImageService
from tare.runtime.service import Runtime
from tare.runtime.store import Store
from tare.state.operations import Operations


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What is looked at. `threads` are those that wait for the kernel and the disk."""

    run: Path
    store: Store
    operations: Operations
    handler: BuiltinHandler
    images: ImageService
    runtime: Runtime
    threads: ThreadPoolExecutor


def queues(sources: Sources, lasting: Lasting) -> Mapping[str, int]:
    """How much waits: for a thread, for a helper's answer, for a lock; calls that go on without their caller, and results that wait for one."""
    images, runtime = sources.images, sources.runtime
    return {
        "threads": sources.threads._work_queue.qsize(),
        **images.backlog(),
        **sources.handler.waiting(),
        "locks": runtime.waiting(),
        "lasting": len(lasting),
        "unclaimed": runtime.runs.unclaimed + runtime.creations.unclaimed,
    }
