"""One real language model for all of these, loaded once: a file's tests go to one worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging

from manyheads.hosts.loading import Loaded, load_model
from manyheads.shrink import release


@pytest.fixture(scope="session")
def _loaded() -> Loaded:
    return load_model("smollm2")


@pytest.fixture
def real(_loaded: Loaded) -> Iterator[Loaded]:
    """SmolLM2-135M-Instruct with its own attention, whatever the test before has left."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    _loaded.model.set_attn_implementation("sdpa")
    yield _loaded
    release(_loaded.model)
    _loaded.model.set_attn_implementation("sdpa")
    logging.set_verbosity_warning()
