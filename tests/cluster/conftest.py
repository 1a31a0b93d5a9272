"""Skips the tests of several nodes where the machine cannot make them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from bed import Bed, why_not
from job import make_inputs


@pytest.fixture(scope="session", autouse=True)
def namespaces() -> None:
    if reason := why_not():
        pytest.skip(f"this machine cannot make nodes: {reason}")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def inputs(original: Path, tmp_path: Path) -> Path:
    """Data and model in the folder that the nodes share."""
    return shutil.copytree(original, tmp_path / "inputs")


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with Bed(tmp_path) as made:
        yield made
