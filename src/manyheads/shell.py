"""What the attention of a hosted checkpoint has besides its equation, the same for every mechanism of the shell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from manyheads.signature import checked_arguments

PROJECTIONS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Shell:
    """Sizes, norms and biases by which a layer of Llama, Qwen3, OLMo 2, Gemma or ViT differs from dim / heads.

    head_dim: features of a head; dim / heads by default. kv_heads: key/value heads, each shared by heads / kv_heads
    query heads. qk_norm: RMS norm of queries and keys before positions, over each head's features (`head`, as in Qwen3)
    or over those of all heads (`whole`, as in OLMo 2). norm_eps: its epsilon. bias: which of q, k, v, o have a bias
    (`{"q": True, "k": True, "v": True}` as in Qwen2), in place of the mechanism's own `bias`. scale: of the scores;
    head_dim ** -0.5 by default. source_dim: features of the context, where they are not those of x. norm_offset: what
    is added to the gains of the query and key norms (1 in Gemma 3). softcap: scores s become
    softcap * tanh(s / softcap) before anything is masked (Gemma 2). out_norm: RMS norm of the heads' outputs, side by
    side, before W_o (the sub-LN of Magneto and BitNet). window: causal layers look back at so many tokens,
    the query's own included (Mistral, Gemma).
    """

    head_dim: int | None = None
    kv_heads: int | None = None
    qk_norm: Literal["head", "whole"] | None = None
    norm_eps: float = 1e-6
    bias: Mapping[str, bool] | None = None
    scale: float | None = None
    source_dim: int | None = None
    norm_offset: float = 0.0
    softcap: float | None = None
    window: int | None = None
    out_norm: bool = False

    @classmethod
    def of(cls, name: str, value: Shell | Mapping[str, Any] | None) -> Shell:
        """From what a constructor or a JSON config holds; ValueErrors begin with `name`."""
        known = [part.name for part in fields(cls)]
        given = vars(value) if isinstance(value, Shell) else {} if value is None else value
        if not isinstance(given, Mapping) or not set(given) <= set(known):
            raise ValueError(f"{name}: shell={value!r}; want a Shell, or a mapping with some of {known}")
        shell = cls(**checked_arguments(f"{name}: shell", cls.__init__, given))
        for key in ("head_dim", "kv_heads", "norm_eps", "scale", "source_dim", "softcap", "window"):
            size = getattr(shell, key)
            if size is not None and not size > 0:
                raise ValueError(f"{name}: shell: {key}={size} must be positive")
        biases = {} if shell.bias is None else shell.bias
        if not set(biases) <= set(PROJECTIONS) or not all(isinstance(b, bool) for b in biases.values()):
            raise ValueError(f"{name}: shell: bias={shell.bias!r}; want True or False for some of {list(PROJECTIONS)}")
        return shell

    @property
    def config(self) -> dict[str, Any]:
        """What is not as by default, as JSON values."""
        return {k: v for k, v in asdict(self).items() if v != type(self).__dataclass_fields__[k].default}
