"""Times are taken once instead of three times, and greedy text is short: how much of either is measured is tested where
it is."""

from collections.abc import Iterator

import pytest

from manyheads.convert import damage


@pytest.fixture(scope="module", autouse=True)
def _little() -> Iterator[None]:
    # For all of a file, so that conversions which its tests share are measured as little.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TURNS": 1, "TIMED_TOKENS": 3, "GREEDY_TOKENS": 4}.items():
            patch.setattr(damage, name, value)
        yield
