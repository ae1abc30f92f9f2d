"""aiohttp, imported when a registry is asked for the first time: it is a third of what a daemon imports, and the one that starts after a crash
has pods to look after before it has images to pull.

    if TYPE_CHECKING:
        import aiohttp
    else:
        from tare.images import later as aiohttp
"""

from __future__ import annotations

from typing import Any


def load() -> None:
    """Import it now, which takes a tenth of a second: for a thread."""
    import aiohttp  # noqa: F401


def __getattr__(name: str) -> Any:
    import aiohttp

    return getattr(aiohttp, name)
