"""Names that other packages have, and what is said to them."""

from __future__ import annotations

import copy
import importlib
from dataclasses import fields, replace
from typing import Any

import pytest
from test_nothing_to_drop import SMALL
from tiny_families import tiny

from manyheads import shrink
from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM
from manyheads.shrink import (
    H2O,
    AdaKV,
    Duo,
    ExpectedAttention,
    Full,
    KeyNorm,
    LongHeads,
    MoA,
    PyramidKV,
    Quantised,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    ThinK,
    TidalDecode,
)

GATES = [[0.5, 0.5]]
SAID: list[tuple[Any, str]] = [
    (lambda: StreamingLLM(n_sink=4), "StreamingLLM: 'n_sink' is sink_size here"),
    (lambda: Duo(head_compression_ratio=0.5), "Duo: 'head_compression_ratio' is compression_ratio here"),
    (lambda: ExpectedAttention(0.5), r"ExpectedAttention\(compression_ratio=0.5\)"),
    (lambda: SnapKV(512), r"SnapKV\(budget_tokens=512\)"),
    (lambda: AdaKV(SnapKV(compression_ratio=0.5)), r"SnapKV\(..., allocation=AdaKV\(\)\)"),
    (lambda: PyramidKV(20.0), "by name: beta"),
    (lambda: AdaKV(alpha_safeguard=0.2), "AdaKV: 'alpha_safeguard' is floor here"),
    (lambda: KeyNorm(compression_ratios=[0.5]), "is compression_ratio, a list"),
    (lambda: KeyNorm(SnapKV()), r"Composed\(SnapKV"),
    (lambda: KeyNorm(press=SnapKV()), "no policy is put around another"),
    (lambda: H2O(windowsize=3), "no argument 'windowsize'; it has .*recent_size"),
    (lambda: H2O(n_sink=3), "no argument 'n_sink'; it has .*recent_size"),
]


@pytest.mark.parametrize(("make", "said"), SAID)
def test_a_name_of_another_package(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("name", "said"),
    [("KnormPress", "KeyNorm"), ("SnapKVPress", "SnapKV"), ("AdaKVPress", r"allocation=AdaKV\(\)"),
     ("ThinKPress", r"storage=ThinK\(...\)"), ("KeyRerotationPress", "positions="), ("DecodingPress", "interval="),
     ("StreamingLLMPress", "StreamingLLM"), ("PerLayerCompressionPress", "compression_ratio=")],
)  # fmt: skip
def test_presses(name: str, said: str) -> None:
    with pytest.raises(ImportError, match=f"{name} is .*{said}.* here"):
        getattr(importlib.import_module("manyheads.shrink"), name)
    assert not hasattr(shrink, "Nothing")
    assert not hasattr(shrink, "NothingPress")


def test_policies_are_copied_as_ever() -> None:
    policy = SnapKV(budget_tokens=40, allocation=AdaKV(floor=0.3))
    assert copy.deepcopy(policy) == policy
    assert replace(policy, budget_tokens=50).allocation == policy.allocation


def test_what_is_said_of_our_own_models() -> None:
    config = ManyheadsConfig(
        layers=["based"], num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=20
    )
    with pytest.raises(ValueError, match=r"layer 0 \(based\) keeps a state in a form of its own"):
        Full().make_cache(ManyheadsForCausalLM(config))
    model = tiny("llama")
    model.config.is_causal = None
    Full().make_cache(model)
    model = tiny("llama")
    model.config.is_causal = False
    with pytest.raises(ValueError, match="is_causal=False"):
        Full().make_cache(model)


# Every class that is given settings, with those that it cannot do without.
GIVEN: dict[Any, dict[str, Any]] = {
    **SMALL, MoA: {"rule": (3, 0.2)}, SimLayerKV: {}, TidalDecode: {}, LongHeads: {}, Quantised: {}, ThinK: {},
    AdaKV: {}, PyramidKV: {},
}  # fmt: skip


@pytest.mark.parametrize("cls", GIVEN, ids=lambda own: own.__name__)
def test_text_in_the_place_of_a_number(cls: Any) -> None:
    settings = GIVEN[cls]
    for own in fields(cls):
        default = settings.get(own.name, own.default)
        if not isinstance(default, (int, float)) and own.name not in ("compression_ratio", "budget_tokens"):
            continue
        for wrong in ("0.5", "7", ["0.5"], float("nan")) if not isinstance(default, bool) else ("no", 1):
            with pytest.raises(ValueError, match=f"{cls.__name__}.*{own.name}"):
                cls(**settings | {own.name: wrong})
