"""What of the image disk nobody wants any more. Pure: sets in, sets out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from tare.images.records import ImageRecord, LayerRecord


def with_ancestors(chain_ids: Iterable[str], layers: Mapping[str, LayerRecord]) -> set[str]:
    """Layers and all that they stand on."""
    found: set[str] = set()
    for chain_id in chain_ids:
        while chain_id and chain_id not in found:
            found.add(chain_id)
            layer = layers.get(chain_id)
            chain_id = layer.parent if layer else ""
    return found


def garbage(
    images: Iterable[ImageRecord],
    layers: Mapping[str, LayerRecord],
    blobs: Collection[str],
    *,
    held: Collection[str],
    in_use: Iterable[str],
    keep_layer_blobs: bool,
) -> tuple[set[str], set[str]]:
    """(chain IDs of layers, digests of blobs) that no image, no pull under way (`held`: chain IDs and digests) and no container (`in_use`) needs."""
    wanted_layers, wanted_blobs = set(in_use), set(held)
    for image in images:
        wanted_layers.update(image.chain_ids)
        wanted_blobs.update(image.documents)
        if keep_layer_blobs:
            wanted_blobs.update(image.layer_digests)
    wanted_layers.update(chain_id for chain_id in held if chain_id in layers)
    return set(layers) - with_ancestors(wanted_layers, layers), set(blobs) - wanted_blobs


def excess(capacity: int, available: int, high: float, low: float) -> int:
    """Bytes to free on a disk of `capacity` of which `available` are free: none until it is `high` percent full, then down to `low` percent."""
    if capacity <= 0 or (capacity - available) * 100 < capacity * high:
        return 0
    return max(0, int(capacity * (100 - low) / 100) - available)


def victims(
    images: Iterable[ImageRecord],
    layers: Mapping[str, LayerRecord],
    blobs: Mapping[str, int],
    *,
    in_use: Collection[str],
    needed: int,
    before: int,
    tagged_too: bool,
) -> list[str]:
    """IDs of images to remove so that `needed` bytes come free, those that were not used for longest first.

    Never one that is pinned, that containers stand on (`in_use`: chain IDs), that has been used or has come since `before` (ns), or,
    unless `tagged_too`, one that has a tag. `blobs`: sizes by digest.
    """
    images = list(images)
    users = Counter(name for image in images for name in _content(image))
    kept = with_ancestors(in_use, layers)
    chosen, freed = [], 0
    for image in sorted(images, key=lambda image: max(image.used_at, image.created_at)):
        if freed >= needed:
            break
        top = image.chain_ids[-1] if image.chain_ids else ""
        if image.pinned or not top or top in in_use or (image.repo_tags and not tagged_too):
            continue
        if max(image.used_at, image.created_at) >= before:
            continue
        chosen.append(image.id)
        for name in _content(image):
            users[name] -= 1
            if not users[name] and name not in kept:
                freed += layers[name].size if name in layers else blobs.get(name, 0)
    return chosen


def _content(image: ImageRecord) -> set[str]:
    # A lowest layer's chain ID may be its blob's digest too, where that is not compressed; it is then counted once, as a layer.
    return {*image.chain_ids, *image.documents, *image.layer_digests}
