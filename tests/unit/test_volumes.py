"""Image volumes as values: the mount that stands for one, the step that it becomes, and what is refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tare.errors import InvalidArgument
from tare.handlers import options, volumes
from tare.images.records import ImageConfig, ImageRecord
from tare.launch import linux
from tare.runtime.records import ContainerConfig, ContainerMetadata, IdMapping, ImageRef, Mount
from tare.runtime.spec import declared
from tare.runtime.spec_mounts import request_mount
from tare.runtime.volumes import ImageVolume, ImageVolumeMountFailed, check_sub_path, mountable, resolved

IMAGE = ImageRef(image="sha256:" + "a" * 64, user_specified_image="registry.example/v:1")
MOUNT = Mount(container_path="/v/", image=IMAGE, readonly=True)
LAYERS = "lowerdir=/l/top:/l/bottom"
RECORD = ImageRecord(
    id="sha256:" + "a" * 64, repo_tags=(), repo_digests=(), size=1, config=ImageConfig(), chain_ids=("sha256:c",)
)


def step(mount: dict[str, Any]) -> list[Any]:
    """What a mount in slot 16 becomes."""
    return list(volumes.union(16, "/v", mount, options.of(mount), b"/base"))


def test_the_mount_and_its_step() -> None:
    mount = request_mount(MOUNT, LAYERS)
    assert mount == {
        "destination": "/v",
        "type": "overlay",
        "source": "overlay",
        "options": ["nodev", "ro", LAYERS],
    }
    flags = linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NODEV
    assert step(mount) == [("union", "mount /v", 16, (b"/l/top", b"/l/bottom"), b"", flags, b"/base")]
    inner = request_mount(replace(MOUNT, image_sub_path="a/b"), LAYERS)
    assert inner["subPath"] == "a/b" and step(inner)[0][4] == b"a/b"


def test_it_stays_read_only_whatever_is_asked_for() -> None:
    mount = request_mount(replace(MOUNT, options=("noexec", "rw")), LAYERS)
    assert step(mount)[0][5] & linux.MOUNT_ATTR_RDONLY and step(mount)[0][5] & linux.MOUNT_ATTR_NOEXEC
    with pytest.raises(InvalidArgument, match="read-only"):
        step({"destination": "/v", "type": "overlay", "options": [LAYERS]})
    mappings = (IdMapping(container_id=0, host_id=1, length=2),)
    for wrong in (replace(MOUNT, options=("upperdir=/x",)), replace(MOUNT, uid_mappings=mappings)):
        with pytest.raises(InvalidArgument):
            request_mount(wrong, LAYERS)


@pytest.mark.parametrize(
    "mount",
    [
        {"type": "overlay", "options": [LAYERS, "upperdir=/u", "workdir=/w"]},
        {"type": "overlay", "options": []},
        {"type": "tmpfs", "options": [LAYERS]},
        {"type": "bind", "source": "/l", "options": ["bind", "ro"]},
    ],
)
def test_other_mounts_are_none(mount: dict[str, Any]) -> None:
    assert step(mount) == []


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1), min_size=1))
def test_any_directory_comes_through_the_option(paths: list[str]) -> None:
    mount = {"type": "overlay", "options": ["ro", volumes.joined(paths)]}
    assert [path.decode() for path in volumes.layers(mount, options.of(mount))] == paths


@pytest.mark.parametrize(
    ("changes", "record", "words"),
    [
        ({"readonly": False}, RECORD, "read-only"),
        ({}, None, "no such image"),
        ({}, replace(RECORD, chain_ids=()), "no layers"),
    ],
)
def test_what_cannot_be_mounted(changes: dict[str, Any], record: ImageRecord | None, words: str) -> None:
    with pytest.raises(ImageVolumeMountFailed, match=words) as caught:
        mountable(replace(MOUNT, **changes), record)
    assert str(caught.value).startswith("ImageVolumeMountFailed: mount image ") and caught.value.code == "UNKNOWN"


def test_sub_paths_are_looked_for_in_all_layers(tmp_path: Path) -> None:
    top, bottom = tmp_path / "top", tmp_path / "bottom"
    (top / "a").mkdir(parents=True)
    (bottom / "a/b").mkdir(parents=True)
    (bottom / "f").touch()
    (top / "link").symlink_to("/../../a/b")
    (top / "loop").symlink_to("loop")

    def look(path: str) -> None:
        asyncio.run(check_sub_path(replace(MOUNT, image_sub_path=path), (top, bottom)))

    for path in ("", "a", "a/b", "./a/", "f", "link"):
        look(path)
    for path in ("c", "f/x", "loop", "..", "a/../..", "/a"):
        with pytest.raises(ImageVolumeMountFailed):
            look(path)


def test_what_an_image_turned_out_to_be_is_kept() -> None:
    other = Mount(container_path="/o", host_path="/srv")
    config = ContainerConfig(metadata=ContainerMetadata(name="c"), image=IMAGE, mounts=(MOUNT, other))
    volume = ImageVolume(image_id="sha256:id", chain_ids=(), lowers=(Path("/l:1"),))
    kept = resolved(config, {"/v/": volume}).mounts
    assert kept == (replace(MOUNT, image=replace(IMAGE, image_ref="sha256:id")), other)
    assert volume.option == "lowerdir=/l\\:1"


def test_declared_directories() -> None:
    image = ImageConfig(volumes=("/a", "b/", "/a/../c", "/", "/x\0y", "/m", "/a"))
    assert declared(image, [{"destination": "/m"}]) == ["/a", "/b", "/c"]
