"""One docker-registry for all tests of this folder that only read from it or push names of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.images import Blob, Layout, make_image
from tests.support.registry import Registry


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry on plain HTTP without authorisation."""
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="session")
def noise() -> bytes:
    """Three megabytes that no compression makes smaller, the same on each run."""
    return b"".join(Blob(str(number).encode()).digest.encode()[7:] for number in range(50_000))


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A small image of two layers."""
    return make_image(
        tmp_path / "layout",
        [{"etc/motd": "hello", "gone": "x"}, {"etc/motd": "hello again"}],
        config={"Cmd": ["/bin/true"], "User": "7", "Env": ["A=b"], "Labels": {"l": "v"}},
    )


@pytest.fixture
def empty_layout(tmp_path: Path) -> Layout:
    """A layout to put images into."""
    return Layout(tmp_path / "layout")
