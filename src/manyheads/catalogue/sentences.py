"""A BERT-shaped sentence model in numpy: a question is answered before torch and transformers would be imported.

A text's vector is the mean of its tokens' last states, of length one (Reimers and Gurevych, arXiv:1908.10084; the model
is Devlin et al.'s, arXiv:1810.04805). The test holds it to transformers' BertModel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class SentenceModel:
    """Reads a folder of config.json, model.safetensors and tokenizer.json; texts are cut after `most` tokens."""

    def __init__(self, folder: Path, most: int) -> None:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if self.config["model_type"] != "bert" or self.config["hidden_act"] != "gelu":
            raise ValueError(f"{folder} holds no BERT with gelu: {self.config['model_type']!r}")
        self.weights: dict[str, Floats] = load_file(folder / "model.safetensors")
        self.tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(most)

    def __call__(self, texts: Sequence[str]) -> Floats:
        """[len(texts), width], each row of length one."""
        return np.stack([self._vector(one.ids) for one in self.tokenizer.encode_batch(list(texts))])

    def _vector(self, ids: list[int]) -> Floats:
        tables = "embeddings.{}_embeddings.weight"
        x = self.weights[tables.format("word")][ids]
        x = x + self.weights[tables.format("position")][: len(ids)] + self.weights[tables.format("token_type")][0]
        x = self._norm("embeddings.LayerNorm", x)
        for layer in range(self.config["num_hidden_layers"]):
            x = self._layer(f"encoder.layer.{layer}", x)
        mean = x.mean(0)
        return np.asarray(mean / np.linalg.norm(mean), np.float32)

    def _layer(self, name: str, x: Floats) -> Floats:
        heads = self.config["num_attention_heads"]
        q, k, v = (
            self._linear(f"{name}.attention.self.{part}", x).reshape(len(x), heads, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / np.float32(q.shape[-1] ** 0.5)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(x.shape)
        attended = self._linear(f"{name}.attention.output.dense", mixed)
        x = self._norm(f"{name}.attention.output.LayerNorm", x + attended)
        inner = _gelu(self._linear(f"{name}.intermediate.dense", x))
        return self._norm(f"{name}.output.LayerNorm", x + self._linear(f"{name}.output.dense", inner))

    def _linear(self, name: str, x: Floats) -> Floats:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, name: str, x: Floats) -> Floats:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(self.config["layer_norm_eps"]))
        return centred / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def _gelu(x: Floats) -> Floats:
    """x Phi(x), by the rational erf of Abramowitz and Stegun, 7.1.26: off by at most 1.5e-7."""
    z = np.abs(x) * np.float32(0.5**0.5)
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(factor)) * t
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    return x * (1 + erf) / 2
