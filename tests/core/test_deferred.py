"""What a training pass gathers is applied when no backward can run an earlier pass again, and not before."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from manyheads import create_attention
from manyheads.functional.deferred import Deferred, recomputing
from manyheads.training import TokenAwarePooling


class Drifts(nn.Module):
    """y = (w + shift) x, where the shift grows by the mean of the inputs gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.shift, self.gathered = torch.zeros(()), torch.zeros(())
        self.deferred = Deferred()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.deferred.due():
            self.shift, self.gathered = self.shift + self.gathered, torch.zeros(())
        y = (self.w + self.shift) * x**2
        if self.training and not recomputing():
            self.gathered = self.gathered + x.detach().mean()
            self.deferred.watch(y)
        return y


def test_applied_after_the_backward_of_every_pass() -> None:
    module = Drifts()
    one, two = module(torch.tensor([1.0])), module(torch.tensor([2.0]))
    assert float(module.shift) == 0
    one.backward()
    three = module(torch.tensor([4.0]))  # the second may still be run again
    assert float(module.shift) == 0
    two.backward()
    three.backward()
    module(torch.tensor([0.0]))
    assert float(module.shift) == 7


def test_a_loss_that_is_thrown_away_does_not_hold_it_up() -> None:
    module = Drifts()
    for _ in range(3):
        y = module(torch.tensor([1.0]))
        del y
    assert float(module.shift) == 2


def test_reentrant_passes_wait_for_their_backward() -> None:
    module, wanted = Drifts(), Drifts()
    for step in range(3):
        inputs = [torch.tensor([1.0 + step]), torch.tensor([2.0])]
        pair: list[list[Tensor]] = []
        for each, way in (
            (wanted, lambda x, m=wanted: m(x)),
            (module, lambda x: checkpoint(module, x, use_reentrant=True)),
        ):  # type: ignore[misc]
            each.zero_grad()
            given = [x.clone().requires_grad_() for x in inputs]
            sum(way(x) for x in given).backward()  # type: ignore[union-attr]
            pair.append([each.w.grad, each.shift, *(x.grad for x in given)])  # type: ignore[list-item]
        assert_close(*pair)
    assert float(module.shift) > 0


def test_a_pass_without_gradients_in_between_is_no_obstacle() -> None:
    module = Drifts()
    for _ in range(3):
        with torch.no_grad():
            module(torch.tensor([1.0]))
        module(torch.tensor([1.0])).backward()
    module(torch.tensor([1.0]))
    assert float(module.shift) == 6


def test_copied_and_left_alone_in_eval() -> None:
    module = Drifts()
    module(torch.tensor([1.0])).backward()
    other = copy.deepcopy(module)
    for each in (module, other):
        assert each.eval()(torch.tensor([1.0])).item() == 1
        each.train()(torch.tensor([1.0]))
        assert float(each.shift) == 1


def test_batch_norm_counts_a_checkpointed_pass_once() -> None:
    found: list[dict[str, Any]] = []
    for way in (None, False, True):
        torch.manual_seed(0)
        module = TokenAwarePooling(create_attention("softmax", 16, 4)).double().train()
        x = torch.randn(2, 9, 16, dtype=torch.float64).requires_grad_()

        def run(x: Tensor, module: Any = module) -> Tensor:
            return module(x).output

        for _ in range(2):
            output = run(x) if way is None else checkpoint(run, x, use_reentrant=way)
            output.square().sum().backward()
        found.append({"x": x.grad, **{k: v.clone() for k, v in module.named_buffers()}})
        found[-1] |= {f"{k}.grad": p.grad for k, p in module.named_parameters()}
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
