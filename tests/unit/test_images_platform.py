"""Platform choice: the best that the machine runs, in order."""

from __future__ import annotations

import pytest

from tare.images.manifest import Descriptor, Index, ManifestError, Platform
from tare.images.platform import AMD64_LEVELS, acceptable, amd64_level, choose, local, runs


def entry(number: int, platform: str | None) -> Descriptor:
    parts = (platform or "").split("/")
    where = (
        Platform(os=parts[0], architecture=parts[1], variant=parts[2] if len(parts) > 2 else "") if platform else None
    )
    return Descriptor(digest=f"sha256:{number:064x}", size=1, platform=where)


def pick(machine: str, *platforms: str | None) -> str | None:
    os, architecture, *variant = machine.split("/")
    index = Index(manifests=tuple(entry(number, platform) for number, platform in enumerate(platforms)))
    chosen = choose(index, Platform(os=os, architecture=architecture, variant=variant[0] if variant else ""))
    return platforms[int(chosen.digest.partition(":")[2], 16)]


@pytest.mark.parametrize(
    ("machine", "offered", "chosen"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], "linux/amd64"),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4", "linux/amd64/v3"], "linux/amd64/v3"),
        ("linux/amd64/v2", ["linux/amd64/v3", "linux/amd64/v1"], "linux/amd64/v1"),
        ("linux/amd64", ["linux/386"], "linux/386"),
        ("linux/amd64", ["windows/amd64", "linux/x86_64"], "linux/x86_64"),
        ("linux/arm64/v8", ["linux/arm/v7", "linux/arm64"], "linux/arm64"),
        ("linux/arm64/v8", ["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm", "linux/arm/v8"], "linux/arm"),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/6"], "linux/arm/6"),
        ("linux/s390x", [None, "linux/s390x"], "linux/s390x"),
        ("linux/s390x", ["linux/amd64", None], None),
        ("linux/amd64", ["unknown/unknown", "linux/amd64"], "linux/amd64"),
    ],
)
def test_the_best_is_chosen(machine: str, offered: list[str | None], chosen: str | None) -> None:
    assert pick(machine, *offered) == chosen


def test_the_first_of_equals_is_chosen() -> None:
    index = Index(manifests=(entry(1, "linux/amd64"), entry(2, "linux/amd64")))
    assert choose(index, Platform(os="linux", architecture="amd64")) == index.manifests[0]


def test_nothing_for_this_machine_says_what_there_is() -> None:
    with pytest.raises(ManifestError, match=r"no image for linux/riscv64; the index offers linux/amd64, linux/arm64"):
        pick("linux/riscv64", "linux/amd64", "linux/arm64")


def test_a_single_image_is_believed_unless_it_says_otherwise() -> None:
    machine = Platform(os="linux", architecture="amd64", variant="v2")
    assert runs(machine, Platform())
    assert runs(machine, Platform(os="linux", architecture="amd64"))
    assert not runs(machine, Platform(os="linux", architecture="arm64"))
    assert not runs(machine, Platform(os="windows", architecture="amd64"))


def test_levels_of_amd64() -> None:
    assert amd64_level([]) == ""
    assert amd64_level(AMD64_LEVELS["v2"]) == "v2"
    assert amd64_level(AMD64_LEVELS["v3"]) == ""
    assert amd64_level(AMD64_LEVELS["v2"] | AMD64_LEVELS["v3"] | AMD64_LEVELS["v4"]) == "v4"


def test_this_machine_runs_its_own() -> None:
    assert runs(local(), local())
    assert acceptable(local())[0][0] == local().architecture
