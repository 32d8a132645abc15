"""Every test starts from the same seed, so that one that fails fails again."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
