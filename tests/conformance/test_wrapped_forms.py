"""Adapters and autocast on forms of a mechanism that its card's example does not build."""

from typing import Any

import pytest

from manyheads import mechanism_class
from manyheads.testing import check_mechanism

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("titans", {"form": "lmm"}),
    ("titans", {"form": "mag"}),
    ("titans", {"form": "mal"}),
    ("linformer", {"sharing": "none", "bias": True}),
    ("linformer", {"sharing": "kv"}),
    ("mosa", {"bias": True, "rotary": {"base": 100.0}}),
    ("mla", {"q_lora_rank": None, "bias": True}),
    ("mega", {"normaliser": "laplace"}),
    ("mega", {"chunk": None}),
    ("softmax", {"kv_heads": 2, "bias": True, "rotary": {"base": 100.0}}),
    ("moba", {"kv_heads": 2, "bias": True, "rotary": {"base": 100.0}}),
]


@pytest.mark.parametrize(("name", "config"), FORMS, ids=lambda value: str(value))
def test_conforms(name: str, config: dict[str, Any]) -> None:
    check_mechanism(mechanism_class(name), properties=["wrapped", "autocast"], config=config)
