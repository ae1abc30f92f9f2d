"""Runtimes and bundles for tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.oci import ORACLES, Bundle, Runtime


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
