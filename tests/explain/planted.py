"""Models whose attention weights are given: one stream, or two that read each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("planted models attend by sdpa or by taps")


class Planted(nn.Module):
    """Weights [h, n, m] are softmax(log weights): the logs are the queries, unit vectors the keys."""

    is_causal = False

    def __init__(self, config: PretrainedConfig, weights: Tensor, dim: int = 4):
        super().__init__()
        self.config = config
        self.logs = nn.Parameter(weights.clamp_min(1e-30).log())
        self.v = nn.Linear(dim, weights.shape[0] * dim)
        self.o = nn.Linear(weights.shape[0] * dim, dim)

    def forward(self, hidden_states: Tensor, source: Tensor | None = None) -> Tensor:
        source = hidden_states if source is None else source
        h, n, m = self.logs.shape
        b = source.shape[0]
        key = torch.eye(m, dtype=source.dtype).expand(b, h, m, m)
        value = self.v(source).unflatten(-1, (h, -1)).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, self.logs.expand(b, h, n, m), key, value, None, scaling=1.0, is_causal=False)
        return self.o(out.flatten(2))


class Pile(PreTrainedModel):
    """x [b, n, 4] -> scores [b, 3] of the last token; residual layers with given weights, each [h, n, n]."""

    config_class = PretrainedConfig
    _supports_sdpa = True

    def __init__(self, weights: list[Tensor]):
        super().__init__(PretrainedConfig(attn_implementation="sdpa"))
        torch.manual_seed(3)
        self.layers = nn.ModuleList(Planted(self.config, each) for each in weights)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x[:, -1])


class Pair(PreTrainedModel):
    """Streams text [b, n, 4] and image [b, m, 4]: each reads itself, each the other, twice, then each itself."""

    config_class = PretrainedConfig
    _supports_sdpa = True

    def __init__(self, n: int = 3, m: int = 2, heads: int = 2):
        super().__init__(PretrainedConfig(attn_implementation="sdpa"))
        torch.manual_seed(5)

        def planted(rows: int, columns: int) -> Planted:
            return Planted(self.config, torch.randn(heads, rows, columns).softmax(-1))

        self.text_first, self.image_first = planted(n, n), planted(m, m)
        self.cross_text, self.cross_image = planted(n, m), planted(m, n)
        self.cross_text_again, self.cross_image_again = planted(n, m), planted(m, n)
        self.text_last, self.image_last = planted(n, n), planted(m, m)
        self.head = nn.Linear(4, 3)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        text, image = text + self.text_first(text), image + self.image_first(image)
        text, image = text + self.cross_text(text, image), image + self.cross_image(image, text)
        text, image = text + self.cross_text_again(text, image), image + self.cross_image_again(image, text)
        text, image = text + self.text_last(text), image + self.image_last(image)
        return self.head(text[:, 0]) + self.head(image).sum(1)


def pair_streams(site: Any) -> tuple[str, str]:
    reader = "text" if "text" in site.path else "image"
    other = "image" if reader == "text" else "text"
    return reader, other if site.path.startswith("cross") else reader
