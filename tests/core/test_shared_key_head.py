"""One key head that all query heads share: what its causal pass is shown as, and what its backward pass then holds."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from manyheads.functional.grouped import attend_grouped

HEADS, D = 8, 16


def tensors(batch: int, n: int) -> tuple[torch.Tensor, ...]:
    seed = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, heads, n, D, generator=seed).requires_grad_() for heads in (HEADS, 1, 1))


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend_grouped(q, k, v, scale=0.25, causal=True)


def peak(attend: Callable[..., torch.Tensor], batch: int, n: int) -> int:
    """Bytes of tensors that the two passes hold at once."""
    inputs = tensors(batch, n)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        attend(*inputs).sum().backward()
    held = most = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_count_of_cores_gives_the_same(cores: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    one, other = tensors(batch, 11), tensors(batch, 11)
    found, wanted = ours(*one), plain(*other)
    assert_close(found, wanted)
    (found * found.detach()).sum().backward()
    (wanted * wanted.detach()).sum().backward()
    for a, b in zip(one, other, strict=True):
        assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("cores", "batch", "copies"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 1, 4), (4, 3, 1), (5, 3, 4), (16, 1, 8)]
)
def test_shown_as_no_more_heads_than_the_cores_need(
    cores: int, batch: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    shown = []
    kernel = F.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: object) -> torch.Tensor:
        assert k.stride(1) == 0 or k.shape[1] == 1, "the keys were copied"
        shown.append((k.shape[1], v.shape[1]))
        return kernel(q, k, v, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    ours(*tensors(batch, 11))
    assert shown == [(copies, copies)]


def test_one_core_holds_what_the_kernel_alone_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert peak(ours, 1, 512) < 1.1 * peak(plain, 1, 512)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_a_batch_and_a_length_that_change(strict: bool) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return ours(q, k, v)

    changes = {0: torch.export.Dim("b", min=2, max=9), 2: torch.export.Dim("n", min=3, max=60)}
    exported = torch.export.export(Attend(), tensors(2, 12), dynamic_shapes=(changes,) * 3, strict=strict).module()
    for batch, n in ((3, 17), (2, 5)):
        one = tensors(batch, n)
        assert_close(exported(*one), ours(*one))
