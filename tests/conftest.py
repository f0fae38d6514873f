"""Fixtures that every test folder uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real imagery, lidar and fixtures that lies beside a developer's checkout.

    Its files may not be redistributed here, so elsewhere these tests skip. In CI they must run.
    """
    folder = ROOT.parent / "shared"
    if not (folder / "data" / "manifest.csv").is_file():
        message = "the shared data folder is not beside this checkout"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{message}, and CI must not skip")
        pytest.skip(message)
    return folder
