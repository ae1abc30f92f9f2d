"""What of the image disk nobody wants any more. Pure: sets in, sets out."""

from __future__ import annotations

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
