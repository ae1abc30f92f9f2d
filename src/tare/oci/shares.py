"""linux.intelRdt: `handlers.rdt` for the configurations that have it, since few have and it would have to be imported for all."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tare.handlers.rdt import Share
    from tare.oci.config import Config


def of(spec: Config, container_id: str) -> Share | None:
    """The share that a configuration asks for; None where it asks for none. Raises as `rdt.share`."""
    if (spec.get("linux") or {}).get("intelRdt") is None:
        return None
    from tare.handlers import rdt

    return rdt.of(spec, container_id)


def apply(share: Share) -> None:
    """Have it. Raises FailedPrecondition."""
    from tare.handlers import rdt

    rdt.apply(share)


def remove(share: Share) -> None:
    """Give up what was made for it. Raises OSError."""
    from tare.handlers import rdt

    rdt.remove(share)
