"""Rollout over 12 layers at n = 2,048 against the matrix products that it needs; memory and time of its other forms.

`fold`: the layers' fused weights are given, rollout(weights) against 12 products [n, n] x [n, n] of the same matrices.
`matrix` and `row`: from the queries and keys of a BERT-shaped and a Llama-shaped stack under taps, weights of 12 heads
included; against the same 12 products, and against making every layer's weights and folding them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common import device_argument, pair, peak_bytes, save
from manyheads.explain.attributions import Rollout, rollout

MEASURES = (
    "src/manyheads/explain/attributions",
    "src/manyheads/hosts",
)

LAYERS, HEADS, LENGTH = 12, 12, 2048

MEMORY = """
import sys, torch
sys.path.insert(0, {folder!r})
import explain_attributions as own, common
call = own.whole({kind!r}, "cpu", sys.argv[1])
baseline = common.peak_reset()
call()
print(common.peak_since(baseline))
"""


def products(matrices: list[Tensor]) -> Tensor:
    state = matrices[0]
    for matrix in matrices:
        state = matrix @ state
    return state


def given(device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, LENGTH, LENGTH)
    return [torch.rand(shape, device=device, generator=generator).softmax(-1) for _ in range(LAYERS)]


def stack(kind: str, device: str) -> Any:
    """Narrow but for attention: 12 layers of 12 heads of 64."""
    import transformers

    torch.manual_seed(0)
    shared = {
        "vocab_size": 64, "hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "max_position_embeddings": LENGTH, "attn_implementation": "sdpa",
    }  # fmt: skip
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**shared)).to(device).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, num_key_value_heads=4)).to(device).eval()


def whole(kind: str, device: str, form: str) -> Any:
    """A call of Rollout on a whole model; form: "all" or "row"."""
    method = Rollout(stack(kind, device))
    tokens = torch.randint(3, 64, (1, LENGTH), device=device)
    return lambda: method.attribute(tokens, position="all" if form == "all" else None)


def main() -> None:
    from pathlib import Path

    device = device_argument()
    torch.set_num_threads(1)
    matrices, rows = given(device), []
    times = pair(lambda: rollout(matrices), lambda: products(matrices), rounds=3, device=device)
    rows.append({"what": "fold", "against": "12 products", "n": LENGTH, "layers": LAYERS, **times})
    save("explain_attributions", device, rows)
    for kind in ("bert", "llama"):
        for form in ("all", "row"):
            times = pair(whole(kind, device, form), lambda: products(matrices), rounds=2, device=device)
            row = {"what": f"{kind}, pass and weights included, {form}", "against": "12 products", "n": LENGTH, **times}
            if device == "cpu":
                script = MEMORY.format(folder=str(Path(__file__).parent), kind=kind)
                row["peak_mib"] = peak_bytes(script, form) / 2**20
            rows.append(row)
            save("explain_attributions", device, rows)


if __name__ == "__main__":
    main()
