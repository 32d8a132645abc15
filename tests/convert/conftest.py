"""Times are taken once instead of three times: how a conversion is timed is tested where it is measured."""

import pytest

from manyheads.convert import damage


@pytest.fixture(autouse=True)
def _one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, "TURNS", 1)
