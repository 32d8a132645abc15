"""The configuration of a model whose layers are any mechanisms."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from manyheads.card import Pattern
from manyheads.models.saved import AUTO_MAP, write_beside
from manyheads.near import suggest
from manyheads.registry import mechanism_class

POSITIONS = ("learned", "rotary", "boxes", "none")
ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "gelu")
PLACEMENTS = ("before", "after", "around")
CAUSAL_LM = "ManyheadsForCausalLM"
BY_KIND = ("mlp", "adapter", "embedding", "positions")
Spec = str | Mapping[str, Any]


class ManyheadsConfig(PreTrainedConfig):
    """Sizes, and which mechanism each layer holds.

    layers: one spec per layer, or a single one for all. A spec is a mechanism's name, or that and its own arguments:
    `{"name": "moba", "block": 32}`; `heads` among them replaces num_attention_heads for that layer. In an
    encoder-decoder these are the encoder's layers; decoder_layers (by default as layers) and cross_layers (by default
    softmax) are the decoder's, num_decoder_layers of each.
    is_causal: True or False holds every layer to that; None leaves it to the head of the model: a causal language model
    wants causal layers, the others take noncausal ones, and causal ones where a mechanism has no other. In what a
    causal language model saved it is True, so that another head on its weights sees no future either.
    decoder_causal: False lets decoder tokens see each other; labels are aligned with them, and nothing is generated.
    back: the spec of a mechanism that reads a higher layer (back-attention). back_layers: the layer to whose input its
    output is added, and the one whose output, of a first pass, it reads (-1: the last); layers from the former to the
    latter pass twice.
    positions: "learned" embeddings, "rotary", "boxes" (learned embeddings of where a token's box stands on a page of
    max_2d_position_embeddings places each way, as in LayoutLM) or "none". Rotary goes to self-attention whose
    constructor takes `rotary`, unless their spec has its own; others get none, as they may have positions of their own.
    intermediate_size: of the MLP after each mixer; 0 leaves it out. hidden_act: "swiglu", "geglu", "geglu_tanh" (gated)
    or "gelu". mlp_bias: on its projections.
    num_local_experts: MLPs in place of each one; a router sends every token to the best num_experts_per_tok of them.
    num_token_kinds: how many kinds of token (text, image, ..) the model is told of, by token_kinds in a call. by_kind:
    what each of them has of its own: the "mlp" behind each mixer, with its norms; the "adapter" before it; an
    "embedding", added to the tokens' own; "positions", learned ones that count the tokens of each kind apart.
    adapter_size: of adapters before each mixer and MLP, which add W_u (silu(W_g h) * W_d h) to what the norm gives, h,
    and nothing at first; 0 leaves them out. mlp_norm: a norm of what goes into an MLP's last projection.
    layer_scale: what gains on all that is added to the stream are at first; None leaves them out.
    norm_placement: of each sublayer's norm, "before" it, "after" it on what it adds (OLMo 2), or "around" it (Gemma 2).
    norm_offset: what is added to the gains of these norms (1 in Gemma). embedding_scale: what embeddings of tokens are
    multiplied by. logit_softcap: logits s become logit_softcap * tanh(s / logit_softcap).
    short_conv: width of a depthwise convolution before each self mixer (causal, or centred where the layer is not
    causal); 0 leaves it out. dropout: on what each sublayer adds. pooling, of the classifiers: "mean", or the spec of a
    mechanism that pools. router_loss_weight: of the mechanisms' auxiliary losses, summed, in the loss.
    stages: of an image classifier, a hierarchy in place of patches and layers: {"stem": [...], "stages": [...], "head":
    {...}}, see manyheads.models.stages; images of any size and a pixel_mask then.
    num_queries: of an object detector, the most boxes that it can find in an image. num_node_features: of a classifier
    of nodes, how many numbers describe a node.
    host: the configuration of the checkpoint whose weights these were; it says how they go back, and nothing else.
    """

    model_type = "manyheads"
    keys_to_ignore_at_inference: ClassVar = ["cache", "past_key_values", "aux_loss", "encoder_last_hidden_state"]

    vocab_size: int = 32000
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "swiglu"
    num_local_experts: int = 1
    num_experts_per_tok: int = 1
    mlp_bias: bool = False
    mlp_norm: bool = False
    num_token_kinds: int = 1
    by_kind: Any = ()
    adapter_size: int = 0
    layer_scale: float | None = None
    norm_placement: str = "before"
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    layers: Any = ("softmax",)
    is_causal: bool | None = None
    back: Any = None
    back_layers: Any = (0, -1)
    num_decoder_layers: int | None = None
    decoder_layers: Any = None
    cross_layers: Any = None
    decoder_causal: bool = True
    positions: str = "rotary"
    rotary_base: float = 10000.0
    max_position_embeddings: int = 2048
    max_2d_position_embeddings: int = 1024
    short_conv: int = 0
    pooling: Any = "mean"
    image_size: Any = 224
    patch_size: int = 16
    num_channels: int = 3
    stages: Any = None
    num_queries: int = 100
    num_node_features: int = 1
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    router_loss_weight: float = 0.01
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    host: Any = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_misspelt(kwargs, [each.name for each in fields(self)])
        for name in ("layers", "decoder_layers", "cross_layers"):
            value = getattr(self, name)
            if isinstance(value, str | Mapping):
                value = [value]
            setattr(self, name, None if value is None else [_checked_spec(f"{name}[{i}]", v) for i, v in _each(value)])
        self.image_size = _sides(self.image_size)
        if self.pooling != "mean":
            self.pooling = _checked_spec("pooling", self.pooling)
        if self.back is not None:
            self.back = _checked_spec("back", self.back)
        if self.stages is not None:
            self.stages = import_module("manyheads.models.layouts").checked_layout(self.stages)
        self._check_values()
        super().__post_init__(**kwargs)
        self._check_patterns()
        # Whoever has a configuration may open its model. The Auto classes hear of the models now and no sooner, as they
        # are heavy, and transformers imports its Auto classes in the middle of importing what the models are made of.
        import_module("manyheads.models.auto")

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """And, beside config.json, what opens the model where manyheads is installed and not imported."""
        self.auto_map = dict(AUTO_MAP)
        if self.architectures == [CAUSAL_LM]:
            self.is_causal = True
        super().save_pretrained(save_directory, **({} if push_to_hub else kwargs))
        write_beside(Path(save_directory), self.architectures)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: what is saved says already how it is opened, and no source file is to be copied beside it."""

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> ManyheadsConfig:
        """The configuration itself: encoder and decoder share it."""
        return self

    def tell_rows(self, shape: Mapping[str, int]) -> None:
        """num_key_value_heads and head_dim of a model that was built: all layers', or neither."""
        for name in ("num_key_value_heads", "head_dim"):
            self.__dict__.pop(name, None)
        self.__dict__.update(shape)

    # -- what each layer is ------------------------------------------------------------------------------------------

    def encoder_specs(self) -> list[Spec]:
        """One per layer, of the encoder or of a model without a decoder."""
        return _repeated("layers", self.layers, self.num_hidden_layers)

    def decoder_specs(self) -> list[Spec]:
        """One per decoder layer, of its self-attention."""
        name, specs = (
            ("layers", self.layers) if self.decoder_layers is None else ("decoder_layers", self.decoder_layers)
        )
        return _repeated(name, specs, self.num_decoders)

    def cross_specs(self) -> list[Spec]:
        """One per decoder layer, of its attention to the encoder."""
        return _repeated("cross_layers", self.cross_layers or ["softmax"], self.num_decoders)

    @property
    def num_decoders(self) -> int:
        return self.num_hidden_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size[0], self.image_size[1]

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    # -- what is refused ---------------------------------------------------------------------------------------------

    def _check_values(self) -> None:
        choices = {"positions": POSITIONS, "hidden_act": ACTIVATIONS, "norm_placement": PLACEMENTS}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r}{suggest(str(value), known)}; want one of {list(known)}")
        least = {"vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 1}
        least |= {"num_channels": 1, "max_position_embeddings": 1, "intermediate_size": 0, "short_conv": 0}
        least |= {"num_token_kinds": 1, "adapter_size": 0, "max_2d_position_embeddings": 1}
        least |= {"num_local_experts": 1, "num_experts_per_tok": 1, "num_queries": 1, "num_node_features": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name}={value!r}; want an integer, at least {minimum}")
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} of num_local_experts={self.num_local_experts}; want "
                "no more than there are"
            )
        if self.num_local_experts > 1 and not self.intermediate_size:
            raise ValueError(f"num_local_experts={self.num_local_experts} are MLPs, and intermediate_size=0 has none")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}; want 0 <= dropout < 1")
        self._check_kinds()
        self._check_back()
        for name in ("embedding_scale", "logit_softcap", "layer_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}; want a positive number")
        if any(side % self.patch_size for side in self.image_shape):
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")

    def _check_kinds(self) -> None:
        self.by_kind = [self.by_kind] if isinstance(self.by_kind, str) else list(self.by_kind)
        for part in self.by_kind:
            if part not in BY_KIND:
                raise ValueError(f"by_kind={self.by_kind}{suggest(str(part), BY_KIND)}; want some of {list(BY_KIND)}")
        if bool(self.by_kind) != (self.num_token_kinds > 1):
            raise ValueError(
                f"num_token_kinds={self.num_token_kinds} and by_kind={self.by_kind}; want at least 2 kinds and what "
                f"each has of its own, some of {list(BY_KIND)}, or neither"
            )
        missing = {"mlp": not self.intermediate_size, "adapter": not self.adapter_size or not self.intermediate_size}
        missing |= {"positions": self.positions != "learned"}
        wants = {"mlp": "intermediate_size above 0", "adapter": "adapter_size and intermediate_size above 0"}
        wants |= {"positions": 'positions="learned"'}
        for part in self.by_kind:
            if missing.get(part):
                raise ValueError(f"by_kind={self.by_kind}: {part!r} wants {wants[part]}")
        if self.num_local_experts > 1 and (self.adapter_size or "mlp" in self.by_kind):
            raise ValueError(
                f"num_local_experts={self.num_local_experts} with adapter_size={self.adapter_size}, by_kind="
                f"{self.by_kind}: a router, or the kinds of tokens, choose an MLP; want one of the two"
            )

    def _check_back(self) -> None:
        layers = list(self.back_layers) if isinstance(self.back_layers, Sequence) else [self.back_layers]
        count, self.back_layers = self.num_hidden_layers, layers
        if len(layers) != 2 or not all(isinstance(i, int) and -count <= i < count for i in layers):
            raise ValueError(
                f"back_layers={layers}; want the layer that reads and the layer that is read, of {count} layers"
            )
        if self.back is None:
            return
        if "higher" not in mechanism_class(spec_name(self.back)).card.takes:
            raise ValueError(f"back is {spec_name(self.back)!r}, which reads no higher layer; want 'back-attention'")
        low, high = self.back_range
        if low > high:
            raise ValueError(f"back_layers={layers}: want a layer that reads what comes after it")

    @property
    def back_range(self) -> tuple[int, int]:
        """`back_layers`, counted from the first."""
        low, high = (i % self.num_hidden_layers for i in self.back_layers)
        return low, high

    def _check_patterns(self) -> None:
        self.encoder_specs()
        if self.is_encoder_decoder:
            if self.back is not None or self.by_kind:
                raise ValueError(
                    "back and by_kind are of models with one stack, not of an encoder-decoder; leave them out"
                )
            for i, spec in enumerate(self.decoder_specs()):
                check_pattern(f"decoder_layers[{i}]", spec, _self_pattern(self.decoder_causal))
            for i, spec in enumerate(self.cross_specs()):
                pattern = Pattern.CAUSAL_CROSS if self.decoder_causal else Pattern.NONCAUSAL_CROSS
                check_pattern(f"cross_layers[{i}]", spec, pattern)
        if self.is_causal is not None:
            for i, spec in enumerate(self.layers):
                check_pattern(f"layers[{i}]", spec, _self_pattern(self.is_causal))
        if self.pooling != "mean":
            check_pattern("pooling", self.pooling, Pattern.POOL)


def _sides(size: Any) -> int | list[int]:
    sides = [size] if isinstance(size, int) else list(size) if isinstance(size, list | tuple) else []
    if len(sides) != (1 if isinstance(size, int) else 2) or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ValueError(f"image_size={size!r}; want the pixels of a side, or [height, width]")
    return size if isinstance(size, int) else sides


# Names of other configurations that say how large a model is or what it computes, and where that is said here.
_ELSEWHERE = {
    **dict.fromkeys(("n_layer", "n_layers", "num_layers"), "num_hidden_layers"),
    **dict.fromkeys(("n_head", "n_heads", "num_heads"), "num_attention_heads"),
    **dict.fromkeys(("n_embd", "d_model"), "hidden_size"),
    **dict.fromkeys(("rope_theta", "rope_parameters", "rope_scaling"), "rotary_base, or `rotary` in a layer's spec"),
    **dict.fromkeys(("attention_dropout", "hidden_dropout_prob", "resid_pdrop"), "dropout"),
    "num_key_value_heads": 'a layer\'s spec: layers={"name": "gqa", "kv_heads": 2}',
    "head_dim": "hidden_size, which heads divide",
    "sliding_window": 'a layer\'s spec: layers={"name": "mswa", "window": 128}',
    "semantic_loss_ignore_index": "-100 in the labels, where nothing is asked",
}


def _refuse_misspelt(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """transformers keeps whatever else it is given, so that `layer="moba"` would make a model of softmax."""
    written = "model_type" in given  # by a model, which tells its rows beside what it was told
    for name in given:
        if name in _ELSEWHERE and not written:
            raise ValueError(f"ManyheadsConfig has no {name!r}; that is said by {_ELSEWHERE[name]}")
        for near in difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            raise ValueError(f"ManyheadsConfig has no {name!r}; did you mean {near!r}?")


def spec_name(spec: Spec) -> str:
    """The mechanism's name in a spec."""
    return spec if isinstance(spec, str) else spec["name"]


def spec_arguments(spec: Spec) -> dict[str, Any]:
    """The constructor arguments in a spec."""
    return {} if isinstance(spec, str) else {k: v for k, v in spec.items() if k != "name"}


def layer_pattern(place: str, spec: Spec, causal: bool | None, *, first: Pattern | None = None) -> Pattern:
    """How a self layer is called. causal None: as `first` (a grid, for images) or noncausal where declared, else
    causal."""
    declared = mechanism_class(spec_name(spec)).card.patterns
    if causal is not None:
        check_pattern(place, spec, _self_pattern(causal))
        return _self_pattern(causal)
    wanted = [*([] if first is None else [first]), Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF]
    for pattern in wanted:
        if pattern in declared:
            return pattern
    raise _undeclared(place, spec, wanted)


def check_pattern(place: str, spec: Spec, pattern: Pattern) -> None:
    """Raises ValueError, naming the layer, where the mechanism does not declare the pattern."""
    if pattern not in mechanism_class(spec_name(spec)).card.patterns:
        raise _undeclared(place, spec, [pattern])


def _undeclared(place: str, spec: Spec, wanted: Sequence[Pattern]) -> ValueError:
    name = spec_name(spec)
    declared = sorted(p.value for p in mechanism_class(name).card.patterns)
    return ValueError(
        f"{place} is {name!r}, which declares {declared}; this layer needs {' or '.join(p.value for p in wanted)} "
        f"(`manyheads list --pattern {wanted[-1].value}` names what fits)"
    )


def _self_pattern(causal: bool) -> Pattern:
    return Pattern.CAUSAL_SELF if causal else Pattern.NONCAUSAL_SELF


def _each(value: Any) -> list[tuple[int, Any]]:
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"layers are {value!r}; want a list of mechanism names, or of {{'name': ..., own arguments}}")
    return list(enumerate(value))


def _repeated(name: str, specs: list[Spec], count: int) -> list[Spec]:
    if len(specs) not in (1, count):
        raise ValueError(f"{name} has {len(specs)} entries for {count} layers; want {count}, or one for all of them")
    return specs * count if len(specs) == 1 else specs


def _checked_spec(place: str, spec: Any) -> Spec:
    if not isinstance(spec, str) and not (isinstance(spec, Mapping) and isinstance(spec.get("name"), str)):
        raise ValueError(
            f"{place} is {spec!r}; want a mechanism's name, or {{'name': a mechanism's name, and its own arguments}}"
        )
    cls = mechanism_class(spec_name(spec))
    known = [p for p in inspect.signature(cls).parameters if p not in ("dim", "causal")]
    for given in spec_arguments(spec):
        if given not in known:
            raise ValueError(f"{place}: {cls.card.name} has no argument {given!r}{suggest(given, known)}; want {known}")
    return spec if isinstance(spec, str) else dict(spec)
