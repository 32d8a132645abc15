"""Fast KVzip: small gates that were trained to say what KVzip would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manyheads.cache_names import given_cache
from manyheads.shrink.textorder import whole_number
from manyheads.shrink.together import NOTED, Fed, Together

_PARTS = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "q_norm.weight", "k_norm.weight", "k_base", "b")
# Of the gates' RMS norms.
_EPS = 1e-6
# From so many tokens on the protected window is a number, below it a share.
_LONG = 32000


@dataclass(kw_only=True)
class FastKVzip(Together):
    """Claim: what KVzip finds by feeding the context twice can be read off the hidden states that attention is given.

    With x_t that state: q, k small projections of it, both RMS-normed, score(t) = mean over a KV head's query heads of
    1 / (1 + sum_s exp(q b_s / sqrt d - q k / sqrt d - bias)), [b, H, m], b_s learned base keys. The best of all layers
    and heads stay (per_layer=True: of each layer), with the first sink_size and the last window_ratio of the context
    (window_size tokens of contexts from 32,000 on), once it is there.
    gates: a state dict for each layer with the parts q_proj, k_proj, q_norm, k_norm, k_base, b, as released (there in a
    pickled file, which is not read here), or the path of a .safetensors file of them, "0.q_proj.weight" and so on.
    Source: arXiv 2601.17668, Janghyun1230/FastKVzip, NVIDIA/kvpress `fastkvzip_press.py`.
    """

    gates: Sequence[Mapping[str, Tensor]] | str | Path | None = None
    window_size: int = 4096
    window_ratio: float = 0.02
    does: ClassVar[str] = "judges a context by its gates"
    why: ClassVar[str] = "drops once the whole context is there"

    def __post_init__(self) -> None:
        whole_number("FastKVzip", "window_size", self.window_size, 1)
        if not 0 <= self.window_ratio < 1:
            raise ValueError(f"FastKVzip: window_ratio is a share of the context, 0 to 1; got {self.window_ratio!r}")
        given = self.gates
        if given is None:
            raise ValueError("FastKVzip needs gates: a path of a .safetensors file, or a state dict for each layer")
        self.pieces = _read(Path(given)) if isinstance(given, (str, Path)) else [dict(own) for own in given]
        for i, own in enumerate(self.pieces):
            missing = [name for name in _PARTS if name not in own]
            if missing:
                raise ValueError(f"FastKVzip: layer {i}'s gate lacks {', '.join(missing)}; want {', '.join(_PARTS)}")
        super().__post_init__()

    def prepare(self, model: Any, cache: Any) -> None:
        super().prepare(model, cache)
        if self.is_full:
            return
        import weakref

        from manyheads.hosts.sites import choose, only_stack

        self._check_shapes(model.config.get_text_config(decoder=True), cache.depth)
        own = weakref.ref(cache)
        for site in choose(model, None, only_stack(model), "self"):
            hook = site.module.register_forward_pre_hook(self._reader(own, site.layer), with_kwargs=True)
            weakref.finalize(cache, hook.remove)

    def _check_shapes(self, config: Any, depth: int) -> None:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = len(self.pieces[0]["q_norm.weight"]) if self.pieces else 0
        wanted = (config.num_attention_heads * width, config.hidden_size)
        found = [tuple(own["q_proj.weight"].shape) for own in self.pieces]
        if len(found) != depth or set(found) != {wanted} or self.pieces[0]["k_base"].shape[0] != heads:
            raise ValueError(
                f"FastKVzip: gates are of {len(found)} layers with q_proj {found[0] if found else 'of nothing'}; this "
                f"model wants {depth} with {wanted} and {heads} KV heads: take the gates that were trained for it"
            )

    def _reader(self, own: Any, layer: int) -> Any:
        def read(module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
            # No kwargs are told while another thread registers or removes the hook of a cache of its own.
            cache = None if kwargs is None else given_cache(kwargs)
            if kwargs is None or cache is not own():
                return
            if cache is None or cache.layers[layer].seen >= cache.context:
                return
            states: Any = kwargs.get("hidden_states", args[0] if args else None)
            known = cache.shared.setdefault(NOTED, {})
            with torch.no_grad():
                found = gated(self.pieces[layer], states)
            before = known[layer] if cache.layers[layer].seen else found[:, :, :0]
            known[layer] = torch.cat([before, found], 2)

        return read

    def score_all(self, module: Any, cache: Any, fed: Fed, alive: Tensor) -> list[Tensor]:
        gates = cache.shared.pop(NOTED, {})
        if len(gates) != cache.depth:
            raise ValueError(
                f"FastKVzip read the states of {len(gates)} of {cache.depth} attention layers of "
                f"{type(module).__name__}: they are not passed on by the names that it knows; use KVzip"
            )
        count = alive.sum(1, keepdim=True)
        share = (count.double() * self.window_ratio + 1e-9).long().clamp_min(1)
        window = torch.where(count < _LONG, share, self.window_size)
        recent = alive.long().cumsum(1) > count - window
        # A gate says less than 1: what is protected stands above all, and below the sinks.
        return [gates[i].masked_fill(recent[:, None], 1) for i in range(len(cache.layers))]


def gated(gate: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """[b, H, n] of hidden states [b, n, e]."""
    wide = torch.promote_types(states.dtype, torch.float32)
    parts = {name: own.to(states.device, wide) for name, own in gate.items()}
    x = states.to(wide)
    heads, width = parts["k_base"].shape[0], parts["k_base"].shape[-1]
    q = nn.functional.linear(x, parts["q_proj.weight"], parts["q_proj.bias"]).unflatten(-1, (heads, -1, width))
    k = nn.functional.linear(x, parts["k_proj.weight"]).unflatten(-1, (heads, 1, width))
    q, k = _norm(q) * parts["q_norm.weight"], _norm(k) * parts["k_norm.weight"]
    logit = (q * k).sum(-1) * width**-0.5 + parts["b"][:, 0]
    base = torch.einsum("bnhrd,hsd->bnhrs", q, parts["k_base"][:, 0]) * width**-0.5
    return (logit - base.logsumexp(-1)).sigmoid().mean(-1).transpose(1, 2)


def _norm(rows: Tensor) -> Tensor:
    return rows * (rows.square().mean(-1, keepdim=True) + _EPS).rsqrt()


def _read(path: Path) -> list[dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    told = 'save the released list of state dicts by save_file({f"{i}.{k}": v for i, own in enumerate(gates) ...})'
    if not path.is_file():
        raise ValueError(f"FastKVzip: gates={str(path)!r} is no file; {told}")
    try:
        held = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"FastKVzip: gates={str(path)!r} is no .safetensors file: {error}; {told}") from error
    found: dict[int, dict[str, Tensor]] = {}
    for key, own in held.items():
        layer, _, name = key.partition(".")
        if not layer.isdecimal():
            raise ValueError(f"FastKVzip: gates={str(path)!r} holds {key!r}; want '0.q_proj.weight' and so on; {told}")
        found.setdefault(int(layer), {})[name] = own
    return [found[layer] for layer in sorted(found)]
