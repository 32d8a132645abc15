"""Patches leave a vision tower between its layers.

with thinned_patches(model, rule):      # rule(layer, states, there) -> which patches [b, q] stay
    model(pixel_values)

To the outside every layer's states are as long as ever: a patch that left keeps the state in which it did. Those that
stay compute what the whole tower would, were the keys of those that left hidden from that layer on.

Legend: b images, n tokens of a tower (class token and patches), q those of them that are still there, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.sites import choose, only_stack, sites
from manyheads.hosts.switching import uncompiled
from manyheads.mechanism import Mechanism
from manyheads.steer.thinning.passes import packed
from manyheads.steer.thinning.tokens import Kept

# layer, states [b, n, D], there [b, n] bool -> there from now on, or Kept with states [b, n, D], or None.
PatchRule = Callable[[int, Tensor, Tensor], "Tensor | Kept | None"]


def tower_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the vision tower, or of a model that has no other; ValueError if they are no plain ViT's."""
    have = {site.stack for site in sites(model)}
    found = choose(model, None, "vision" if "vision" in have else only_stack(model), "self")
    parents = [site.path.rpartition(".")[0] for site in found]
    # ViT of older releases keeps its attention one module deeper.
    parents = [path.removesuffix(".attention") for path in parents]
    layers = [model.get_submodule(path) for path in parents]
    if (
        any(isinstance(site.module, Mechanism) for site in found)
        or len({path.rpartition(".")[0] for path in parents}) != 1
    ):
        raise ValueError(f"{type(model).__name__}: patches can leave layers of a plain ViT alone; it has {parents}")
    return layers


@contextmanager
def thinned_patches(model: nn.Module, rule: PatchRule) -> Iterator[None]:
    """Patches leave where the rule says so; a mask of the caller's own is refused. Nothing that left comes back."""
    layers = tower_layers(model)
    state = _Tower(model, rule)
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(state.before(index), with_kwargs=True).remove)
            # Before the hooks by which the library keeps hidden states.
            stack.callback(layer.register_forward_hook(state.after, prepend=True).remove)
        yield


class _Tower:
    def __init__(self, model: Any, rule: PatchRule):
        self._model, self._rule = model, rule
        self._there: Tensor | None = None
        self._whole: Tensor | None = None
        self._order: tuple[Tensor, Tensor] | None = None

    def before(self, index: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            states, *rest = args if args else (kwargs.pop("hidden_states"),)
            if states.dim() != 3:
                raise ValueError(
                    f"{type(self._model).__name__}: its tower has the patches of all pictures in one row "
                    f"{list(states.shape)}; patches can leave a tower of [pictures, patches, width] alone"
                )
            if index == 0:
                self._there, self._order = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device), None
            assert self._there is not None
            found = self._rule(index, states, self._there)
            if isinstance(found, Kept):
                found, states = found
            if found is not None and not bool((found | ~self._there).all()):
                self._there = self._there & found
                self._order = packed(self._there)
            if self._order is None:
                return (states, *rest), kwargs
            if (rest and rest[0] is not None) or kwargs.get("attention_mask") is not None:
                raise ValueError("patches cannot leave a tower that is given an attention mask of its own")
            order, there = self._order
            self._whole = states
            mask = None if bool(there.all()) else self._mask(there, states)
            few = states.gather(1, order[..., None].expand(-1, -1, states.shape[-1]))
            return (few,), {**kwargs, "attention_mask": mask}

        return hook

    def after(self, module: Any, args: Any, output: Any) -> Any:
        if self._order is None or self._whole is None:
            return output
        order, there = self._order
        few = output if isinstance(output, Tensor) else output[0]
        rows = torch.arange(len(few), device=few.device)[:, None].expand_as(order)
        whole = self._whole.index_put((rows[there], order[there]), few[there])
        return whole if isinstance(output, Tensor) else (whole, *output[1:])

    def _mask(self, there: Tensor, states: Tensor) -> Tensor:
        """[b, 1, q, q], added to the scores."""
        hidden = torch.zeros(there.shape, dtype=states.dtype, device=states.device)
        hidden = hidden.masked_fill(~there, torch.finfo(states.dtype).min)
        return hidden[:, None, None].expand(-1, 1, there.shape[1], -1)
