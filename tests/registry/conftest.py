"""A home with a migrated MLflow database."""

import shutil
from pathlib import Path

import pytest

from registry.home import Home
from registry.tracking import Tracking
from tests.registry.workshop import Workshop


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with all tables: making one takes seconds, copying it does not."""
    home = Home.at(tmp_path_factory.mktemp("template"))
    Tracking(home).client.search_experiments()
    return home.database


@pytest.fixture
def home(tmp_path: Path, migrated: Path) -> Home:
    """An empty home; its path has a space in it."""
    home = Home.at(tmp_path / "a home")
    home.root.mkdir()
    shutil.copyfile(migrated, home.database)
    return home


@pytest.fixture
def workshop(home: Home) -> Workshop:
    """Artifacts and records in an empty home."""
    return Workshop(home)
