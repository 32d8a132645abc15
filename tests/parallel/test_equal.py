"""Every scheme in 1, 2 and 3 processes is what one process computes, and in 4 and 8 at what is drawn at random: see
the modules of cases."""

import decoding_cases
import heads_cases
import plan_cases
import pytest
import random_cases
import ring_cases
import state_cases
import switch_cases
import torch
from processes import reports
from torch.testing import assert_close

from manyheads.parallel import Layout, ring_attention

MODULES = (ring_cases, state_cases, heads_cases, switch_cases, decoding_cases, plan_cases, random_cases)
NAMES = [f"{module.__name__}: {name}" for module in MODULES for name in module.CASES]


@pytest.fixture(scope="module", params=[1, 2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return reports(tmp_path_factory.mktemp("equal"), request.param, *(module.__name__ for module in MODULES))


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(found: list[dict[str, str]], name: str) -> None:
    assert [report[name] for report in found] == [""] * len(found)


@pytest.fixture(scope="module", params=[4, 8])
def among_many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return reports(tmp_path_factory.mktemp("many"), request.param, random_cases.__name__)


@pytest.mark.parametrize("name", list(random_cases.CASES))
def test_equals_one_among_many(among_many: list[dict[str, str]], name: str) -> None:
    assert [report[f"{random_cases.__name__}: {name}"] for report in among_many] == [""] * len(among_many)


def test_without_torch_distributed_it_is_a_group_of_one() -> None:
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    assert_close(ring_attention(q, k, k, Layout(9), causal=True), expected)
