"""Times are taken once instead of three times, and greedy text is short: how much of either is measured is tested where
it is."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from manyheads.convert import damage
from manyheads.convert.distilled import student
from manyheads.hosts.loading import load_model


@pytest.fixture(scope="module", autouse=True)
def _little() -> Iterator[None]:
    # For all of a file, so that conversions which its tests share are measured as little.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TURNS": 1, "TIMED_TOKENS": 3, "GREEDY_TOKENS": 4}.items():
            patch.setattr(damage, name, value)
        yield


@pytest.fixture(scope="session")
def halved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with every other layer of the packaged model: for commands that train, where what it knows is nothing to
    the test."""
    folder: Path = tmp_path_factory.mktemp("halved") / "model"
    student(load_model().model, 2).save_pretrained(folder)
    return str(folder)
