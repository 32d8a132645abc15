"""Every test starts from the same seed, so that one that fails fails again."""

import gc
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch


def pytest_configure() -> None:
    # torch.manual_seed also writes down the call stack for each of three kinds of devices that are not there: 5 ms a
    # call under pytest, in thousands of tests and in what they test.
    if not torch.accelerator.is_available():
        torch.manual_seed = torch.random.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests first, then those with most tests: what is left for one of two workers at the end is short.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    many = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -many[item.path], item.path))


def pytest_collection_finish() -> None:
    # What modules and thousands of tests are made of stays to the end: no collector need look through it again.
    gc.collect()
    gc.freeze()
    if forked := sys.modules.get("forked"):
        forked.start()


def pytest_unconfigure() -> None:
    if forked := sys.modules.get("forked"):
        forked.stop()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _guards_are_not_timed() -> None:
    # For a line in its log, torch empties the processor's caches and times the guards of each graph that it traces.
    from torch._dynamo import guards

    guards.profile_guard_manager = lambda *_: 0.0


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One Chromium for all tests of a process: its driver can be started once."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail("the pages are tested in a real browser: install Chromium (Debian: apt-get install chromium)")
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def scheduler() -> Iterator[str]:
    """The address of a Dask scheduler with one worker in this process."""
    from dask_clusters import cluster_of

    with cluster_of(processes=False) as address:
        yield address
