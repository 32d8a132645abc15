"""Seeds, and transformers kept quiet."""

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    yield
    logging.set_verbosity_warning()
