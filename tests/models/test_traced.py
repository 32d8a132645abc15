"""Models exported whole, with a length that may change."""

from __future__ import annotations

import pytest
import torch
from tiny_models import causal_lm, tokens
from torch import Tensor, nn
from torch.testing import assert_close


class Logits(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.model = causal_lm(*names)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_exported_with_a_length_that_changes() -> None:
    module = Logits("softmax", "mla")
    exported = torch.export.export(
        module, (tokens(2, 12),), dynamic_shapes=({1: torch.export.Dim("n", min=2, max=60)},), strict=False
    ).module()
    for n in (5, 17):
        with torch.no_grad():
            assert_close(exported(tokens(2, n)), module(tokens(2, n)))
