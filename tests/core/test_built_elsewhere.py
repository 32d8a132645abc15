"""Modules as libraries build and call them: on the meta device, in another default dtype, through torch.func, beside
packages that do not load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.initialization import meta_device_safe_creation_ops

from manyheads import create_attention, list_attentions, mechanism_class
from manyheads.card import Pattern
from manyheads.testing.case import Case, each


def first_case(name: str) -> Case:
    cls = mechanism_class(name)
    return Case(cls, min(cls.card.patterns))


@pytest.mark.parametrize("name", list_attentions())
def test_built_without_numbers_and_loaded_it_is_whole(name: str) -> None:
    """As large models are: nothing but parameters and buffers may hold what the constructor computed."""
    case = first_case(name)
    saved = case.unfed(torch.float32).state_dict()
    # As from_pretrained does it, which keeps torch.linspace on the CPU.
    with torch.device("meta"), meta_device_safe_creation_ops():
        empty = case.cls(**case.settings)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(saved, assign=True)
    assert not any(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])


# Which tokens go where depends on their numbers.
LOOKS = {"combiner", "dgqa", "largegt", "mixture-of-transformers", "moa", "seqboat", "supergat"}


@pytest.mark.parametrize("pattern", list(Pattern))
def test_passed_without_numbers_it_says_the_shape(pattern: Pattern) -> None:
    """As programs count memory and FLOPs; what looks at numbers says so."""
    for name in list_attentions(pattern=pattern.value):
        case = Case(mechanism_class(name), pattern)
        module, x = case.build(torch.float32), case.x(6, dtype=torch.float32)
        context = case.context(6, dtype=torch.float32)
        wanted = case.outputs(module, x, context).output
        given = x.to("meta"), each(context, lambda part: part.to("meta"))
        if name in LOOKS:
            with pytest.raises(ValueError, match=f"{name}: .*numbers"):
                module.to("meta")(*given)
            continue
        found = module.to("meta")(*given).output
        assert found.is_meta
        assert found.shape == wanted.shape, name


@pytest.mark.parametrize("name", list_attentions())
def test_built_in_half_precision(name: str) -> None:
    case, usual = first_case(name), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = case.cls(**case.settings)
    finally:
        torch.set_default_dtype(usual)
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


# The shell, and those with a derivative of their own.
@pytest.mark.parametrize("name", ["softmax", "entmax", "supergat", "largegt", "relation-aware", "neighborhood"])
def test_gradients_of_a_functional_call(name: str) -> None:
    case = first_case(name)
    module, x, context = case.build(), case.x(5), case.context(5)
    own = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        output = torch.func.functional_call(module, parameters, (x, context)).output
        return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()

    found = torch.func.grad(loss)(own)
    wanted = torch.autograd.grad(loss(own), list(own.values()), allow_unused=True)
    for key, gradient in zip(own, wanted, strict=True):
        assert_close(found[key], torch.zeros_like(own[key]) if gradient is None else gradient, msg=key)


def test_gradients_of_each_example_by_itself() -> None:
    torch.manual_seed(0)
    module, x = create_attention("entmax", 16, 4, causal=True).double(), torch.randn(3, 5, 16).double()
    own = {key: value.detach() for key, value in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, parameters, (row[None],)).output
        return output.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(own, x)
    for i, row in enumerate(x):
        alone = torch.func.grad(loss)(own, row)
        for key in own:
            assert_close(found[key][i], alone[key])


ASKED = """
import warnings
from manyheads import create_attention
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    print(create_attention("softmax", 8, 2).card.name, *(warning.message for warning in told), sep="\\n")
"""


def test_packages_that_do_not_load_take_none_of_ours_away(tmp_path: Path) -> None:
    broken = {"needy": ("import no_such_module", "no_such_module"), "odd": ("Theirs = 3", "names a int")}
    broken["clash"] = ("from manyheads.mechanisms.projection.gqa import GQA\nclass Theirs(GQA): pass", "'gqa'")
    for name, (source, _) in broken.items():
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: their-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[manyheads.mechanisms]\ntheirs = {name}:Theirs\n")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    told = os.environ | {"PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", ASKED], env=told, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert lines[0] == "softmax", run
    for name, (_, why) in broken.items():
        (line,) = [line for line in lines if f"'their-{name}', is left out" in line]
        assert why in line


@pytest.mark.parametrize("name", [None, 7, ["softmax"], torch.nn.Linear])
def test_a_name_that_is_none_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="the name of a mechanism is"):
        create_attention(name, 8, 2)
