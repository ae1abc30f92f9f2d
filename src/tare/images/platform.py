"""Which of an index's images this machine runs. Pure, save for `local`, which asks the kernel what the machine is.

A machine takes an ordered list of platforms, best first: an amd64 machine of level v3 takes amd64/v3, then v2, then plain
amd64, then 386; arm/v7 takes v7, v6, v5; arm64 takes arm64/v8, then arm. Names are Go's (GOOS, GOARCH).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from tare.images.manifest import Descriptor, Index, ManifestError, Platform

MACHINES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
    "ppc64le": ("ppc64le", ""),
    "s390x": ("s390x", ""),
    "riscv64": ("riscv64", ""),
}
# What the x86-64 psABI asks of each level, in /proc/cpuinfo's words; a level has all of those below it.
AMD64_LEVELS = {
    "v2": {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"},
    "v3": {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"},
    "v4": {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"},
}


def amd64_level(flags: Iterable[str]) -> str:
    """The variant of an amd64 machine with these CPU flags: "" for the base level, else "v2", "v3" or "v4"."""
    has, level = set(flags), ""
    for name, needed in AMD64_LEVELS.items():
        if not needed <= has:
            break
        level = name
    return level


def local() -> Platform:
    """This machine."""
    machine = os.uname().machine
    architecture, variant = MACHINES.get(machine, (machine, ""))
    if architecture == "amd64":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        variant = amd64_level(next((line.split()[2:] for line in lines if line.startswith("flags")), ()))
    return Platform(os="linux", architecture=architecture, variant=variant)


def acceptable(machine: Platform) -> list[tuple[str, str]]:
    """(architecture, variant) pairs that the machine runs, best first."""
    if machine.architecture == "amd64":
        level = int(machine.variant[1:] or 1)
        return [("amd64", f"v{n}") for n in range(level, 1, -1)] + [("amd64", ""), ("386", "")]
    if machine.architecture == "arm64":
        return [("arm64", "v8"), *((("arm", f"v{n}")) for n in (8, 7, 6, 5))]
    if machine.architecture == "arm":
        return [("arm", f"v{n}") for n in range(int(machine.variant[1:] or 7), 4, -1)]
    return [(machine.architecture, machine.variant)]


def normalised(platform: Platform) -> tuple[str, str]:
    """(architecture, variant) with the names that mean the same made the same: amd64/v1 is amd64, arm64 is arm64/v8, arm is arm/v7."""
    architecture, variant = platform.architecture.lower(), platform.variant.lower()
    architecture = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386"}.get(
        architecture, architecture
    )
    if variant and variant[0].isdigit():
        variant = f"v{variant}"
    if architecture == "amd64" and variant == "v1":
        variant = ""
    if not variant:
        variant = {"arm64": "v8", "arm": "v7"}.get(architecture, "")
    return architecture, variant


def runs(machine: Platform, image: Platform) -> bool:
    """Can the machine run an image of that platform? An image that does not say is believed."""
    if image.os and image.os.lower() != machine.os:
        return False
    return not image.architecture or normalised(image) in acceptable(machine)


def choose(index: Index, machine: Platform) -> Descriptor:
    """The entry for this machine; of equals the first. Entries without a platform come last. Raises ManifestError."""
    ranks = {pair: rank for rank, pair in enumerate(acceptable(machine))}
    best: tuple[int, Descriptor] | None = None
    for entry in index.manifests:
        if entry.platform is None:
            rank: int | None = len(ranks)
        else:
            rank = ranks.get(normalised(entry.platform)) if entry.platform.os.lower() == machine.os else None
        if rank is not None and (best is None or rank < best[0]):
            best = (rank, entry)
    if best is None:
        offered = ", ".join(sorted({str(entry.platform) for entry in index.manifests if entry.platform})) or "nothing"
        raise ManifestError("choose platform", cause=f"no image for {machine}; the index offers {offered[:300]}")
    return best[1]
