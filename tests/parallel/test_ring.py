"""Ring attention in 1, 2 and 3 processes is that of one; see ring_cases.py."""


import pytest
import torch
from processes import reports
from ring_cases import CASES
from torch.testing import assert_close

from manyheads.parallel import Layout, ring_attention


@pytest.fixture(scope="module", params=[1, 2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return reports(tmp_path_factory.mktemp("ring"), request.param, "ring_cases")


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(found: list[dict[str, str]], name: str) -> None:
    assert [report[name] for report in found] == [""] * len(found)


def test_without_torch_distributed_it_is_a_group_of_one() -> None:
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    assert_close(ring_attention(q, k, k, Layout(9), causal=True), expected)
