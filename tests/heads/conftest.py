"""Transformers kept quiet, and the packaged model loaded once."""

from collections.abc import Iterator

import pytest
from transformers.utils import logging

from manyheads.hosts.loading import Loaded, load_model


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity_warning()


@pytest.fixture(scope="session")
def packaged() -> Loaded:
    return load_model()
