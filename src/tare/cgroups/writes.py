"""One value for one file of a control group, and what a file's old content is as a value to put back (pure)."""

from __future__ import annotations

from tare.cgroups.value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Absent = Literal["skip", "ignore", "refuse"]

UNLIMITED_RATES = "rbps=max wbps=max riops=max wiops=max"
UNLIMITED_HANDLES = "hca_handle=max hca_object=max"
# Files with one line a device; what is written of a device that has none, so that it has none again.
BY_DEVICE = {
    "io.max": UNLIMITED_RATES,
    "io.weight": "default",
    "io.bfq.weight": "0",
    "rdma.max": UNLIMITED_HANDLES,
    "blkio.weight_device": "0",
    "blkio.bfq.weight_device": "0",
    "blkio.leaf_weight_device": "0",
    "blkio.throttle.read_bps_device": "0",
    "blkio.throttle.write_bps_device": "0",
    "blkio.throttle.read_iops_device": "0",
    "blkio.throttle.write_iops_device": "0",
    "net_prio.ifpriomap": "0",
}


class Write(Value):
    """One value for one file of the group.

    `absent` is what a file that is not there means: a thing to name as skipped, nothing, or an error; `instead` is tried before that.
    """

    __slots__ = ("absent", "controller", "file", "instead", "value")

    def __init__(
        self, controller: str, file: str, value: str, absent: Absent = "skip", instead: Write | None = None
    ) -> None:
        self.controller = controller
        self.file = file
        self.value = value
        self.absent = absent
        self.instead = instead


def bounded(value: int) -> str:
    """A limit as v2 writes it."""
    return "max" if value < 0 else str(value)


def putting_back(item: Write, text: str) -> Write | None:
    """The write that undoes one, from the file's text before it; None where nothing has to be done."""
    value = previous(item.file, item.value, text)
    return None if value is None else Write(item.controller, item.file, value, "ignore")


def previous(file: str, value: str, text: str) -> str | None:
    """What to write to a file to have its old content again."""
    if file == "memory.oom_control":
        return next((line.split()[1] for line in text.splitlines() if line.startswith("oom_kill_disable ")), None)
    if file in BY_DEVICE:
        first, _, rest = value.partition(" ")
        device = first if rest else "default"
        lines = (line for line in text.splitlines() if line.partition(" ")[0] == device)
        found = next(lines, None)
        if found is None:
            # A file with a single number is its default's.
            return text.strip() if not rest else f"{device} {BY_DEVICE[file]}"
        return found
    # An empty cpuset is written as an empty line: a write of no bytes does not arrive.
    return text.strip() or "\n"
