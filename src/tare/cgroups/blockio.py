"""OCI `linux.resources.blockIO` as writes: blkio of v1, io of v2 (pure).

Weights are BFQ's where a device has that scheduler, and else the cost model's on v2 or, on v1, those of a scheduler that
kernels since 5.0 do not have. Throttles are v1's files by kind, and on v2 one line for each device.

Source: OCI runtime-spec, config-linux.md, "Block IO"; kernel cgroup-v1/blkio-controller.rst, cgroup-v2.rst ("IO"), block/bfq-iosched.rst.
"""

from __future__ import annotations

from tare.cgroups.memory import not_in_v2
from tare.cgroups.section import Section, present
from tare.cgroups.writes import Write

LEAST, GREATEST = 10, 1000
HIGHEST = (1 << 32) - 1
RATES = (1 << 64) - 1
THROTTLES = (
    ("throttleReadBpsDevice", "blkio.throttle.read_bps_device", "rbps"),
    ("throttleWriteBpsDevice", "blkio.throttle.write_bps_device", "wbps"),
    ("throttleReadIOPSDevice", "blkio.throttle.read_iops_device", "riops"),
    ("throttleWriteIOPSDevice", "blkio.throttle.write_iops_device", "wiops"),
)


def blkio(whole: Section) -> list[Write]:
    """v1."""
    section = present(whole, "blockIO")
    writes = []
    common = weight_of(section, "weight")
    if common:
        writes.append(first_version("blkio.bfq.weight", "blkio.weight", str(common)))
    leaf = weight_of(section, "leafWeight")
    if leaf:
        writes.append(Write("blkio", "blkio.leaf_weight", str(leaf)))
    for item in section.sections("weightDevice"):
        device, own, leaf = device_weights(item)
        if own:
            writes.append(first_version("blkio.bfq.weight_device", "blkio.weight_device", f"{device} {own}"))
        if leaf:
            writes.append(Write("blkio", "blkio.leaf_weight_device", f"{device} {leaf}"))
    for key, file, _ in THROTTLES:
        for item in section.sections(key):
            writes.append(Write("blkio", file, f"{device_of(item)} {rate_of(item)}"))
    return writes


def first_version(file: str, other: str, value: str) -> Write:
    """BFQ's file, or the older scheduler's."""
    return Write("blkio", file, value, instead=Write("blkio", other, value))


def io(whole: Section) -> list[Write]:
    """v2. A rate of 0 lifts the limit, as it does on v1. Raises FailedPrecondition for leaf weights, which v2 does not have."""
    section = present(whole, "blockIO")
    if weight_of(section, "leafWeight"):
        raise not_in_v2(section, "leafWeight")
    writes = []
    common = weight_of(section, "weight")
    if common:
        writes.append(second_version("", common))
    for item in section.sections("weightDevice"):
        device, own, leaf = device_weights(item)
        if leaf:
            raise not_in_v2(item, "leafWeight")
        writes.append(second_version(f"{device} ", own))
    limits: dict[str, list[str]] = {}
    for key, _, word in THROTTLES:
        for item in section.sections(key):
            limits.setdefault(device_of(item), []).append(f"{word}={rate_of(item) or 'max'}")
    return writes + [Write("io", "io.max", f"{device} {' '.join(words)}") for device, words in limits.items()]


def second_version(prefix: str, weight: int) -> Write:
    """BFQ's file, or that of the cost model."""
    other = Write("io", "io.weight", f"{prefix}{converted(weight)}")
    return Write("io", "io.bfq.weight", f"{prefix}{weight}", instead=other)


def converted(weight: int) -> int:
    """io.weight (1–10000) for a weight of v1 (10–1000), on the straight line through the ends of both scales, as in runc and crun."""
    return 1 + (weight - LEAST) * 9999 // (GREATEST - LEAST)


def device_weights(item: Section) -> tuple[str, int, int]:
    """("major:minor", weight, leaf weight), 0 for none; one of them is there."""
    own, leaf = weight_of(item, "weight"), weight_of(item, "leafWeight")
    if not own and not leaf:
        raise item.wrong("weight", "there is neither weight nor leafWeight")
    return device_of(item), own, leaf


def weight_of(section: Section, key: str) -> int:
    """10 to 1000; 0 where it is not set."""
    value = section.integer(key, 0, GREATEST) or 0
    if 0 < value < LEAST:
        raise section.wrong(key, f"{value} is not between {LEAST} and {GREATEST}")
    return value


def device_of(item: Section) -> str:
    """ "major:minor"."""
    return f"{item.required('major', 0, HIGHEST)}:{item.required('minor', 0, HIGHEST)}"


def rate_of(item: Section) -> int:
    """Bytes or operations a second."""
    return item.required("rate", 0, RATES)
