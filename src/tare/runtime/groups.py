"""Which pods share a logger (pure): at most so many, and never pods of two Kubernetes namespaces, handlers or user-namespace mappings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from tare.runtime.records import PodConfig


def family(config: PodConfig, handler: str) -> str:
    """What pods must have in common to share a logger, as a name."""
    user = config.security.namespaces.mapped
    mappings = (user.uids, user.gids) if user is not None else None
    text = repr((config.metadata.namespace, handler, mappings))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def choose(family_name: str, taken: Iterable[str], limit: int) -> str:
    """The first group of this family with fewer than `limit` pods; `taken` names the group of every pod."""
    counts: dict[str, int] = {}
    for group in taken:
        counts[group] = counts.get(group, 0) + 1
    number = 0
    while counts.get(f"{family_name}-{number}", 0) >= max(1, limit):
        number += 1
    return f"{family_name}-{number}"
