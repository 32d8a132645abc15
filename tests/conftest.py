"""Every test starts from the same seed, so that one that fails fails again."""

import gc

import pytest
import torch


def pytest_collection_finish() -> None:
    # What modules and thousands of tests are made of stays to the end: no collector need look through it again.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # The CPU's generator alone: torch.manual_seed also notes the call stack for three devices that are not there, which
    # over thousands of tests takes longer than many of them.
    torch.default_generator.manual_seed(0)
