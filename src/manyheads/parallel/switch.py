"""`with sequence_parallel(model): ...`: a whole model on shards of its sequence.

Shapes: b rows, s tokens of this process's part, h heads, d features.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manyheads.cache_names import CACHE_NAMES
from manyheads.mechanism import Mechanism
from manyheads.parallel import hosted
from manyheads.parallel.decoding import Memory, greedy
from manyheads.parallel.halo import tokens_before, windowed_attention
from manyheads.parallel.heads import heads_attention
from manyheads.parallel.layout import Kind, Layout
from manyheads.parallel.ring import ring_attention
from manyheads.parallel.shards import KINDS, reduce_gradients, shard
from manyheads.parallel.states import state_attention
from manyheads.parallel.wire import add_up, all_gather, place

Softmax = Literal["ring", "heads"]

_open: weakref.WeakKeyDictionary[nn.Module, Spread] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Part:
    """What this process holds of the sequence that passes: padding and documents [b, s], each None in all processes
    where it says nothing in any."""

    layout: Layout
    padding: Tensor | None
    documents: Tensor | None


class Spread:
    """An open `sequence_parallel`: cuts batches, gathers results, and reads other processes' tokens for the layers."""

    def __init__(self, model: Any, group: dist.ProcessGroup | None, kind: Kind, softmax: Softmax) -> None:
        self.model, self.group, self.kind, self.softmax = model, group, kind, softmax
        self.part: Part | None = None
        self._memory: Memory | None = None
        self._remember = self._one_token = False

    # -- for who holds it --

    def shard(self, batch: Mapping[str, Any], *, even: bool = False) -> dict[str, Any]:
        """`shard` by the layout that this model wants."""
        return shard(batch, self.group, self.kind, even=even)

    def whole(self, x: Tensor, dim: int = 1) -> Tensor:
        """What the last pass gave for its tokens, logits say, for the tokens of all processes in order; no gradient."""
        return self._now().layout.whole(x, dim)

    def total(self, x: Tensor) -> Tensor:
        """The sum over processes, of the losses of shards say; no gradient."""
        return add_up(x.detach().clone(), place(self.group))

    def reduce_gradients(self, parameters: Any) -> None:
        """`reduce_gradients` in this group."""
        reduce_gradients(parameters, self.group)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """Greedy decoding, [b, n + new]: what `generate(do_sample=False)` of one process gives.

        input_ids, attention_mask [b, n]: the whole prompts, in every process, padded on the left. Each process reads
        its shard and keeps the keys and values of that alone (`decoding.Memory`); new tokens are kept in turn. A row
        that has come to eos_token_id, or one of several, goes on with pad_token_id, or that itself; both are those of
        the model's generation_config where they are not given. ValueError for what that has beside them and
        suppress_tokens, such as a penalty.
        """
        given = (input_ids, attention_mask, max_new_tokens, eos_token_id, pad_token_id)
        try:
            return greedy(self, self.model, *given)
        finally:
            self._memory, self._one_token = None, False

    def first_pass(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Logits of this process's last token, after which the layers remember all of the batch."""
        self._remember = True
        try:
            logits: Tensor = model(**self.shard(batch), logits_to_keep=1).logits
        finally:
            self._remember = False
        return logits

    def next_pass(self, model: Any, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [b, 1, v] of tokens [b, 1] behind those that the layers remember, the same in every process."""
        assert self._memory is not None
        self._memory.begin_token()
        self._one_token = True
        mask = torch.ones_like(tokens)
        logits: Tensor = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        return logits

    def agreed(self, chosen: Tensor, *, first: bool) -> Tensor:
        """Tokens [b] as the process has chosen them that holds the last one, or at later tokens the first process."""
        at, layout = place(self.group), self._now().layout
        holds = [rank for rank in range(at.size) if layout.length - 1 in layout.index(rank)[-1:]]
        return all_gather(chosen, at)[holds[0] if first else 0]

    # -- for the layers: see `inner.Across` --

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, windows: Sequence[int] | None) -> Tensor:
        if self._memory is not None and self._one_token:
            return self._memory.read_pairs(q, k, v, scale, windows)
        if self._memory is not None:
            self._memory.keep_pairs(k, v)
        part = self._now()
        layout, padding, documents = part.layout, part.padding, part.documents
        if windows is not None and layout.kind == "contiguous" and documents is None:
            return windowed_attention(q, k, v, layout, windows, padding=padding, scale=scale)
        if windows is not None and len(set(windows)) > 1:
            raise ValueError(
                "sequence_parallel: heads of several windows over packed documents; give each a row of its own"
            )
        attention = heads_attention if self.softmax == "heads" else ring_attention
        window = None if windows is None else windows[0]
        return attention(q, k, v, layout, causal=True, window=window, padding=padding, documents=documents, scale=scale)

    def recall(self, q: Tensor, k: Tensor, v: Tensor, kernel: Any, *, causal: bool, slopes: Tensor | None) -> Tensor:
        if self._memory is not None and self._one_token:
            return self._memory.read_sums(q, k, v, kernel, slopes)
        part = self._alone("a memory that is summed up")
        if self._memory is not None:
            self._memory.keep_sums(k, v, kernel, slopes)
        return state_attention(q, k, v, part.layout, kernel, causal=causal, padding=part.padding, slopes=slopes)

    def before(self, x: Tensor, count: int) -> Tensor:
        if self._memory is not None and self._one_token:
            return self._memory.read_rows(x)
        if self._memory is not None:
            self._memory.keep_rows(x, count)
        return tokens_before(x, count, self._alone("a convolution").layout)

    def sums(self, x: Tensor, *, causal: bool) -> Tensor:
        if self._memory is not None and self._one_token:
            return self._memory.read_total(x)
        at = self._alone("moments of all that came before").layout.place
        everyone = all_gather(x.detach(), at)
        if self._memory is not None:
            self._memory.keep_total(everyone.sum(0))
        return everyone[: at.rank if causal else None].sum(0)

    def _alone(self, what: str) -> Part:
        part = self._now()
        if part.documents is not None:
            raise ValueError(
                f"sequence_parallel: several documents in a row, and {what}, which would go on from one into the next; "
                "give each document a row of its own"
            )
        return part

    def _now(self) -> Part:
        if self.part is None:
            raise ValueError("sequence_parallel: no shard has passed yet; call the model with what shard() gives")
        return self.part

    # -- the pass --

    def begin(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the model's forward: reads off what was given whose part it is."""
        if self._one_token:
            return args, kwargs
        named = {**kwargs, **dict(zip(("input_ids",), args, strict=False))}
        _check_call(model, args, named)
        length, number = (int(x) for x in named.pop("shard_of"))
        tokens = named["input_ids"] if named.get("inputs_embeds") is None else named["inputs_embeds"]
        (b, n), device = tokens.shape[:2], tokens.device
        mask, documents = named.pop("attention_mask", None), named.pop("seq_idx", None)
        real = None if mask is None else mask.bool()
        says = real is not None and not bool(real.all())
        at, layout = place(self.group), Layout(length, KINDS[number], self.group)
        labels = named.get("num_items_in_batch")
        labels = -1 if labels is None else int(labels)
        here = torch.tensor([b, length, number, says, documents is not None, labels], device=device)
        everyone = all_gather(here, at)
        self._check_alike(everyone, n, layout)
        if not bool(everyone[:, 3].any()):
            real = None
        elif real is None:
            real = torch.ones(b, n, dtype=torch.bool, device=device)
        if bool(everyone[:, 4].any()) and documents is None:
            raise ValueError("sequence_parallel: seq_idx was given in some processes only; want shards of one batch")
        self.part = Part(layout, real, documents)
        self._memory = Memory(layout, real) if self._remember else None
        if named.get("position_ids") is None:
            named["position_ids"] = self._positions(model, b, device)
        # A mask, be it of ones, says that positions which do not count up are no documents.
        named["attention_mask"] = torch.ones(b, n, dtype=torch.long, device=device) if real is None else real.long()
        return (), named | {"use_cache": False}

    def _check_alike(self, everyone: Tensor, n: int, layout: Layout) -> None:
        if bool((everyone[:, :3] != everyone[:1, :3]).any()):
            found = everyone[:, :3].tolist()
            raise ValueError(
                f"sequence_parallel: the processes hold shards of {found} (rows, length, {list(KINDS)}); want all "
                "of one batch"
            )
        if bool((everyone[:, 5] != everyone[0, 5]).any()):
            raise ValueError(
                f"sequence_parallel: the processes were given num_items_in_batch={everyone[:, 5].tolist()}; want the "
                "labels of the whole batch in each (of Trainer: average_tokens_across_devices=True)"
            )
        if layout.kind != self.kind and self.kind == "contiguous":
            raise ValueError(
                f"sequence_parallel: a {layout.kind} shard was given, and layers that want a {self.kind} one: cut it "
                "by the context's own shard()"
            )
        layout.check("sequence_parallel", n)

    def _positions(self, model: Any, b: int, device: torch.device) -> Tensor:
        """As the model in one process has them where none are given."""
        part = self._now()
        usual = part.layout.index().to(device)[None].expand(b, -1)
        if part.padding is None or not _ours(model):
            return usual
        whole = part.layout.whole(part.padding.to(torch.int8)).long()
        return part.layout.shard((whole.cumsum(-1) - 1).clamp(min=0))


@contextmanager
def sequence_parallel(
    model: Any, group: dist.ProcessGroup | None = None, *, softmax: Softmax = "ring"
) -> Iterator[Spread]:
    """While open, the model's sequence is spread over the processes of a group (None: all).

        with sequence_parallel(model) as spread:
            out = model(**spread.shard(batch))  # the logits of this process's tokens, and its share of the loss
            out.loss.backward()
        spread.reduce_gradients(model)  # those of one process with the whole batch

    model: ManyheadsForCausalLM with mechanisms whose cards say how (`parallel`), or a causal language model of
    transformers (`hosted.FAMILIES`), also inside of peft, DistributedDataParallel or torch.compile, by which it is then
    called; the same weights in every process. softmax: "ring" or, where the processes divide
    the key heads, "heads". Softmax layers alone take zigzag shards; states, convolutions and windows alone contiguous
    ones, and so does a mixture: `spread.shard` and `spread.kind` know. All processes call alike, backward included,
    which may run after the context is closed. Random numbers are each process's own: without dropout all is as in one.
    ValueError for a model or mechanism without a scheme, one that is elsewhere than the group can reach, a second
    context on the same model, gradient checkpointing (its second run may find another shard), attention dropout,
    output_attentions, and calls with anything but a shard.
    """
    if softmax not in ("ring", "heads"):
        raise ValueError(f"sequence_parallel: softmax={softmax!r} was given; want 'ring' or 'heads'")
    model = _inside(model)
    if model in _open:
        raise ValueError(
            f"sequence_parallel: {type(model).__name__} is in another one already, of this or another group; "
            "leave that first"
        )
    place(group)
    _check_device(model, group)
    ours = _ours(model)
    spread = Spread(model, group, _check_mechanisms(model) if ours else hosted.check(model), softmax)
    with ExitStack() as stack:
        from manyheads.hosts.switching import uncompiled

        stack.enter_context(uncompiled())
        _open[model] = spread
        stack.callback(_open.pop, model, None)
        if ours:
            for module in _readers(model):
                module.spread_over = spread
                stack.callback(delattr, module, "spread_over")
        else:
            stack.enter_context(hosted.spread(model, spread))
        stack.callback(model.register_forward_pre_hook(spread.begin, with_kwargs=True).remove)
        yield spread


def _inside(model: Any) -> Any:
    """The model that others have put something around."""
    while True:
        if hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        else:
            return model


def _ours(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "model_type", None) == "manyheads")


def _readers(model: nn.Module) -> list[Any]:
    """The modules in which tokens meet."""
    from manyheads.models.layers import ShortConvolution

    return [module for module in model.modules() if isinstance(module, (Mechanism, ShortConvolution))]


def _check_mechanisms(model: Any) -> Kind:
    from manyheads.models.heads import ManyheadsForCausalLM

    name = type(model).__name__
    if not isinstance(model, ManyheadsForCausalLM):
        raise ValueError(
            f"sequence_parallel: {name} was given; want a ManyheadsForCausalLM: others join a row's tokens behind "
            "the layers"
        )
    if model.config.num_local_experts > 1:
        raise ValueError(
            f"sequence_parallel: {name} has {model.config.num_local_experts} experts, whose balance is over all tokens "
            "and not a sum over shards; want num_local_experts=1"
        )
    mechanisms = [module for module in _readers(model) if isinstance(module, Mechanism)]
    without = sorted({m.card.name for m in mechanisms if m.card.parallel is None})
    if without:
        from manyheads.registry import list_attentions, mechanism_class

        known = [n for n in list_attentions() if mechanism_class(n).card.parallel]
        raise ValueError(
            f"sequence_parallel: {', '.join(without)} cannot be spread over processes; these can: {', '.join(known)}"
        )
    if told := sorted(model.reads):
        raise ValueError(
            f"sequence_parallel: {name} reads {', '.join(told)} beside its tokens, which no shard has; want a model "
            "without (see its by_kind, positions and layers)"
        )
    pairs = all(m.card.parallel in ("ring", "heads") and getattr(m, "span", None) is None for m in mechanisms)
    return "zigzag" if pairs and not model.config.short_conv else "contiguous"


def _check_device(model: Any, group: dist.ProcessGroup | None) -> None:
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"sequence_parallel: the model lies on {sorted(map(str, devices))}; want it on one device in each process"
        )
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    device, backend = next(iter(devices)), dist.get_backend(group)
    reached = {"gloo": "cpu", "nccl": "cuda"}.get(backend, device.type)
    if device.type != reached:
        raise ValueError(
            f"sequence_parallel: the model lies on {device}, and {backend} sends what lies on {reached}; move the "
            "model, or give a group of another backend"
        )


def _check_call(model: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    name = type(model).__name__
    if named.get("shard_of") is None or len(args) > 1:
        raise ValueError(f"sequence_parallel: {name} was called without shard_of; want model(**spread.shard(batch))")
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"sequence_parallel: {name} checkpoints gradients, and the layers' second run would not know its shard; "
            "call gradient_checkpointing_disable()"
        )
    for what in (*CACHE_NAMES, "use_cache", "output_attentions"):
        if named.get(what):
            raise ValueError(f"sequence_parallel: {what} was given with a shard; leave it out")
    if getattr(model.config, "output_attentions", False):
        raise ValueError(
            "sequence_parallel: the configuration has output_attentions=True, of which no process has a row; unset it"
        )
    wanted = next(model.parameters()).device
    for key, value in named.items():
        if isinstance(value, Tensor) and key not in ("shard_of", "num_items_in_batch") and value.device != wanted:
            raise ValueError(
                f"sequence_parallel: {key} lies on {value.device}, and {name} on {wanted}; move one of them"
            )
