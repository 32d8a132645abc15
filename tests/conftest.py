"""Every test starts from the same seed, so that one that fails fails again."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # The CPU's generator alone: torch.manual_seed also notes the call stack for three devices that are not there, which
    # over thousands of tests takes longer than many of them.
    torch.default_generator.manual_seed(0)
