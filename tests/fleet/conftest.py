"""Where Ray keeps its sockets and logs during a test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import fsspec
import pytest


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[str]:
    """A short path, as those of sockets must be; removed afterwards."""
    folder = f"/tmp/ray-{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def store():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/store", recursive=True)
