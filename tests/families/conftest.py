"""Directories of the tiny models, and the page, written at the end of `make models-page`."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from families import figures
from families.table import FAMILIES


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model directory of a family, by name."""

    @cache
    def made(name: str) -> Path:
        return FAMILIES[name].directory(tmp_path_factory.mktemp(name))

    return made


def pytest_sessionfinish() -> None:
    if figures.WRITING:
        figures.write()
