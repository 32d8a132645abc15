"""What a model learns from in a step of training: the text, a teacher's expectations, or a teacher's relations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from manyheads.convert.layout import attentions
from manyheads.hosts.loading import Loaded
from manyheads.training.relations import minilm_loss

# ids [b, n] -> loss
Lesson = Callable[[Tensor], Tensor]
TEMPERATURE, SOFT, HARD, HIDDEN = 2.0, 5.0, 2.0, 1.0
_SENTENCE = "The pass key is 48213.\n\tdef f(x): return x ** 2  # ünïcode, 漢字"


@contextmanager
def text(model: Any, teacher: Any) -> Iterator[Lesson]:
    """Cross-entropy of the next token."""
    yield lambda ids: model(ids, labels=ids, use_cache=False).loss


@contextmanager
def expectations(model: Any, teacher: Any) -> Iterator[Lesson]:
    """DistilBERT's three losses, on every token:

        5 T^2 KL(softmax(z_teacher / T) || softmax(z / T)) + 2 cross-entropy + (1 - cos(h, h_teacher)),   T = 2

    z: logits. h: hidden states after the last layer; where the widths differ that term is left out. Source: Sanh et
    al., DistilBERT, arXiv:1910.01108, with the weights of its released commands, for a decoder: the cross-entropy is
    that of the next token. The recipe of Efficient Transformer Knowledge Distillation, arXiv:2311.13657.
    """
    own_size, size = (vocabulary(each) for each in (model, teacher))
    if own_size != size:
        raise ValueError(f"a student of {own_size} tokens and a teacher of {size}: want one vocabulary for both")
    seen: dict[str, Tensor] = {}
    hooks = [
        each.get_output_embeddings().register_forward_pre_hook(
            lambda module, args, who=who: seen.__setitem__(who, args[0])
        )
        for who, each in (("own", model), ("other", teacher))
    ]

    def lesson(ids: Tensor) -> Tensor:
        with torch.no_grad():
            other = teacher(ids, use_cache=False).logits
        out = model(ids, labels=ids, use_cache=False)
        loss = HARD * out.loss + SOFT * soft_loss(out.logits, other)
        own_state, state = seen["own"], seen["other"]
        if own_state.shape == state.shape:
            loss = loss + HIDDEN * (1 - cosine_similarity(own_state.float(), state.float(), -1)).mean()
        return loss

    try:
        yield lesson
    finally:
        for hook in hooks:
            hook.remove()


def vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def soft_loss(own: Tensor, other: Tensor) -> Tensor:
    """T^2 KL(softmax(other / T) || softmax(own / T)), the mean over tokens. own, other: logits [b, n, vocabulary]."""
    kind = torch.promote_types(own.dtype, torch.float32)
    q, p = ((logits.to(kind) / TEMPERATURE).log_softmax(-1) for logits in (own, other))
    return TEMPERATURE**2 * (p.exp() * (p - q)).sum(-1).mean()


@contextmanager
def relations(model: Any, teacher: Any) -> Iterator[Lesson]:
    """`minilm_loss` of the last layer's queries, keys and values, as they are projected: before norms and rotation,
    causal. The teacher's layer: its last, or of 24 layers and more the one at 7/8 (the 21st of 24), as in
    arXiv:2012.15828."""
    own, other = attentions(model)[-1], attentions(teacher)
    of = other[-1] if len(other) < 24 else other[len(other) * 7 // 8 - 1]
    widths = [layer.projections()[f"{part}_proj"].out_features for layer in (own, of) for part in "qkv"]
    heads = relation_heads(widths)
    seen: dict[tuple[str, str], Tensor] = {}
    hooks = [
        layer.projections()[f"{part}_proj"].register_forward_hook(
            lambda module, args, output, at=(who, part): seen.__setitem__(at, output)
        )
        for who, layer in (("own", own), ("other", of))
        for part in "qkv"
    ]

    def lesson(ids: Tensor) -> Tensor:
        with torch.no_grad():
            teacher(ids, use_cache=False, logits_to_keep=1)
        model(ids, use_cache=False, logits_to_keep=1)
        mine, wanted = ([seen[who, part] for part in "qkv"] for who in ("own", "other"))
        return minilm_loss(mine, wanted, heads=heads, causal=True)

    try:
        yield lesson
    finally:
        for hook in hooks:
            hook.remove()


def relation_heads(widths: list[int]) -> int:
    """The most relation heads, up to the paper's 48, that divide every width and leave 8 features to the narrowest;
    one where there are none."""
    common = math.gcd(*widths)
    return max(k for k in range(1, 49) if common % k == 0 and (k == 1 or min(widths) // k >= 8))


LESSONS: Mapping[str, Callable[[Any, Any], AbstractContextManager[Lesson]]] = {
    "full": text,
    "lora": text,
    "distil": expectations,
    "relations": relations,
}


def check_teacher(student: Loaded, teacher: Loaded) -> None:
    """ValueError for a teacher that reads text as other tokens."""
    sizes = [vocabulary(each.model) for each in (student, teacher)]
    same = sizes[0] == sizes[1] and student.encode(_SENTENCE) == teacher.encode(_SENTENCE)
    if same and student.tokenizer is not None and teacher.tokenizer is not None:
        same = student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    if not same:
        raise ValueError(
            f"--against {teacher.name} has another tokenizer than {student.name} ({sizes[1]} and {sizes[0]} tokens): "
            "its expectations say nothing about the student's tokens; give a teacher of the same family"
        )
