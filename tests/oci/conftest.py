"""Runtimes and bundles for tests, and nothing left of them: the interpreter's read-only mount goes if no test before had it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.oci import seals, state
from tests.support.oci import ORACLES, Bundle, Runtime


@pytest.fixture(scope="session", autouse=True)
def seal_is_temporary() -> Iterator[None]:
    """The mount is made once for each boot, and meant to stay; here it goes, where it was not there before."""
    before = os.path.exists(seals.DIRECTORY)
    root = os.path.exists(state.DEFAULT_ROOT)
    yield
    if not root and os.path.exists(state.DEFAULT_ROOT):
        shutil.rmtree(state.DEFAULT_ROOT)  # podman's calls name no other; what it holds by now is compiled filters
    if not before and os.path.exists(seals.DIRECTORY):
        for place in Path(seals.DIRECTORY).glob(f"{seals.PREFIX}*/{seals.INTERPRETER}"):
            if seals.mounted(str(place)):
                subprocess.run(["umount", str(place)], check=True)
        shutil.rmtree(seals.DIRECTORY)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle to change and run."""
    return Bundle(tmp_path / "bundle")


@pytest.fixture
def tare(tmp_path: Path) -> Iterator[Runtime]:
    """Tare alone."""
    runtime = Runtime("tare", tmp_path / "tare")
    yield runtime
    runtime.close()


@pytest.fixture(params=ORACLES)
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Runtime]:
    """Tare, and each of the others that run here."""
    found = Runtime(request.param, tmp_path / request.param)
    yield found
    found.close()
