"""Image volumes in a real container: layers stacked read-only, a path within them, links that lead nowhere outside, declared directories."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tare.handlers import compile as compiler
from tare.handlers.builtin import StartFailed
from tare.handlers.compile import Compiled
from tare.handlers.volumes import joined
from tests.support.launch import Json, Launch, in_launch

pytestmark = pytest.mark.root


def layers(base: Path, *trees: dict[str, str | None]) -> list[Path]:
    """Directories of layers, top first: text of files by path, None for a whiteout."""
    found = []
    for number, tree in enumerate(trees):
        layer = base / f"volume:{number}"
        layer.mkdir()
        for name, text in tree.items():
            path = layer / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is None:
                os.mknod(path, 0o020000, 0)
            else:
                path.write_text(text)
        found.append(layer)
    return found


def volume(lowers: list[Path], sub_path: str = "", *options: str) -> Json:
    """A mount of them at /v."""
    given = ["nodev", *options, "ro", joined([str(path) for path in lowers])]
    mount: Json = {"destination": "/v", "type": "overlay", "source": "overlay", "options": given}
    return mount | ({"subPath": sub_path} if sub_path else {})


SHOW = "cat /v/a; ls /v; touch /v/new 2>&1; grep -c ' /v ' /proc/self/mountinfo"


def test_layers_are_stacked_and_read_only(tmp_path: Path) -> None:
    stack = layers(tmp_path, {"a": "top\n", "gone": None}, {"a": "bottom\n", "gone": "x", "b": "b\n"})

    async def body(launch: Launch) -> None:
        result = await launch.run(["sh", "-c", SHOW], mounts=[volume(stack)])
        assert result.out == "top\na\nb\ntouch: /v/new: Read-only file system\n1\n", result
        assert not (stack[0] / "new").exists()

    in_launch(tmp_path, body)


def test_a_single_layer_is_bound_and_read_only(tmp_path: Path) -> None:
    stack = layers(tmp_path, {"a": "one\n"})
    (stack[0] / "tool").write_text("#!/bin/sh\necho runs\n")
    (stack[0] / "tool").chmod(0o755)

    async def body(launch: Launch) -> None:
        result = await launch.run(["sh", "-c", f"{SHOW}; /v/tool"], mounts=[volume(stack)])
        assert result.out == "one\na\ntool\ntouch: /v/new: Read-only file system\n1\nruns\n", result
        result = await launch.run(["sh", "-c", "/v/tool"], mounts=[volume(stack, "", "noexec")])
        assert result.code == 126

    in_launch(tmp_path, body)


@pytest.mark.parametrize("count", [1, 2])
def test_a_path_within(tmp_path: Path, count: int) -> None:
    stack = layers(tmp_path, {"d/a": "inner\n"}, {"d/b": "lower\n"})[:count]
    os.symlink("/d", stack[0] / "absolute")
    os.symlink("../../../../d/a", stack[0] / "upward")

    async def body(launch: Launch) -> None:
        names = "a\n" if count == 1 else "a\nb\n"
        for sub_path in ("d", "absolute", "./d/."):
            result = await launch.run(["sh", "-c", "ls /v; touch /v/new 2>&1"], mounts=[volume(stack, sub_path)])
            assert result.out == f"{names}touch: /v/new: Read-only file system\n", result
        for sub_path in ("d/a", "upward"):
            result = await launch.run(["sh", "-c", "cat /v; echo x > /v"], mounts=[volume(stack, sub_path)])
            assert (result.out, "Read-only" in result.err) == ("inner\n", True), result

    in_launch(tmp_path, body)


def test_no_path_leads_out_of_the_image(tmp_path: Path) -> None:
    stack = layers(tmp_path, {"d/a": "inner\n"}, {"etc/x": "image's\n"})
    os.symlink("../../../../../etc", stack[0] / "d/escape")
    os.symlink("/proc/1/root", stack[0] / "magic")

    async def body(launch: Launch) -> None:
        result = await launch.run(["ls", "/v"], mounts=[volume(stack, "d/escape")])
        assert result.out == "x\n"
        for sub_path in ("magic", "not/there", "d/a/below"):
            with pytest.raises(StartFailed, match="mount /v"):
                await launch.run(["ls", "/v"], mounts=[volume(stack, sub_path)])
        assert "/run/rootfs" not in Path("/proc/self/mountinfo").read_text()

    in_launch(tmp_path, body)


def test_kernels_without_lowerdir_plus(tmp_path: Path) -> None:
    """The way of kernels before 6.5: forced by a name that fsconfig does not take, since it is longer than 255 bytes."""
    deep = tmp_path / ("x" * 200) / ("y" * 100)
    deep.mkdir(parents=True)
    stack = layers(deep, {"d/a": "top\n"}, {"d/b": "bottom\n"})

    async def body(launch: Launch) -> None:
        result = await launch.run(["sh", "-c", "ls /v/d; touch /v/n"], mounts=[volume(stack)])
        assert (result.out, "Read-only" in result.err) == ("a\nb\n", True), result
        result = await launch.run(["ls", "/v"], mounts=[volume(stack, "d")])
        assert result.out == "a\nb\n"

    in_launch(tmp_path, body)


def test_declared_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = compiler.container

    def with_directories(spec: Json, *rest: Any) -> Compiled:
        return original({**spec, "directories": ["/var/lib/db", "/tmp", "/link/deep"]}, *rest)

    monkeypatch.setattr(compiler, "container", with_directories)

    async def body(launch: Launch) -> None:
        os.symlink("/elsewhere", launch.layer / "link")
        result = await launch.run(["stat", "-c", "%n %a %u", "/var/lib/db", "/tmp", "/elsewhere/deep"])
        assert result.out == "/var/lib/db 755 0\n/tmp 1777 0\n/elsewhere/deep 755 0\n", result

    in_launch(tmp_path, body)
