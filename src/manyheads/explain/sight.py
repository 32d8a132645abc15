"""Where the words of an answer about a picture came from: patches or words, picture or prior, and by which heads.

For every token t of the answer, given those before it, with row i its place in the sequence:

    attention   A_ij of every layer and head, j a patch or a word
    edges       A_ij d log p(t) / d A_ij, to first order what log p(t) loses without that look; signed
    sources     x_j . d log p(t) / d x_j of the vectors x_j that enter the language model, patches and words alike:
                what they give by whatever path (gradient times input)
    gain        log2 p(t | picture, text) - log2 p(t | text): bits that the picture gave. Without it the row has no
                image tokens, so that words behind them move up. Beside it stands what is said to a blank, every pixel
                the picture's mean colour
    VHD         |o_i(picture, text) - o_i(text)|, the vision-aware head divergence of arXiv 2412.13949: o a head's
                output before the output projection. The paper takes the first token of the answer and sets to 0 heads
                that grow without the picture (a rule known at second hand, and left out); here every token of the
                answer is measured
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.calls import opened
from manyheads.hosts.seeing import Seeing
from manyheads.hosts.taps import record

STACK = "language"
# An answer leans on the prior where the picture makes it less than so many bits likelier.
PRIOR_BITS = 1.0


@dataclass(frozen=True)
class Layout:
    """Where the picture's patches stand in a row of tokens: rows x columns of them from token `first` on."""

    first: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.first + self.rows * self.columns

    def grid(self, values: Tensor) -> Tensor:
        """[..., tokens] -> [..., rows, columns]"""
        return values[..., self.first : self.stop].unflatten(-1, (self.rows, self.columns))


@dataclass(frozen=True)
class Sight:
    """One answer and what it came from; k tokens of an answer, n tokens of the row (prompt and answer).

    inputs: the row with its picture. attention, edges [k, layers, heads, n]; sources [k, n]; divergence [k, layers,
    heads]; with_image, without_image, blank [k] probabilities of the answer's tokens, each given those before.
    """

    seeing: Seeing
    inputs: dict[str, Tensor]
    layout: Layout
    answer: list[int]
    attention: Tensor
    edges: Tensor
    sources: Tensor
    divergence: Tensor
    with_image: Tensor
    without_image: Tensor
    blank: Tensor
    said_without: list[int]
    said_blank: list[int]

    @property
    def prompt(self) -> int:
        """Tokens before the answer."""
        return self.inputs["input_ids"].shape[1] - len(self.answer)

    @property
    def gain(self) -> Tensor:
        """[k] bits that the picture gave each token of the answer."""
        tiny = torch.finfo(self.with_image.dtype).tiny
        return self.with_image.clamp_min(tiny).log2() - self.without_image.clamp_min(tiny).log2()

    @property
    def leans(self) -> str:
        """ "image" or "prior": prior where the same is said without the picture, and the picture adds less than a bit
        to all of it."""
        same = self.said_without == self.answer
        return "prior" if same and float(self.gain.sum()) < PRIOR_BITS else "image"


def see(seeing: Seeing, picture: Any, text: str, *, most: int = 32) -> Sight:
    """The model's own answer to a text about a PIL picture, and where it came from. ValueError for a model whose
    attention the taps do not open, an empty answer, and what `Seeing.inputs` refuses."""
    prompt = seeing.inputs([picture], [text])
    blank = {**prompt, "pixel_values": blanked(prompt["pixel_values"])}
    alone = seeing.without(prompt)
    answer = seeing.generate(prompt, most=most)[0]
    if not answer:
        raise ValueError(f"{seeing.name} says nothing to this picture and text: its first token ends the answer")
    whole, bare = continued(prompt, answer), continued(alone, answer)
    attention, edges, sources, shares, seen = _traced(seeing, whole, answer)
    without, unseen = _outputs(seeing, bare, answer)
    return Sight(
        seeing,
        whole,
        layout(seeing, prompt),
        answer,
        attention,
        edges,
        sources,
        (seen - unseen).norm(dim=-1),
        shares,
        without,
        _probabilities(seeing.model(**continued(blank, answer)).logits.detach(), answer),
        seeing.generate(alone, most=most)[0],
        seeing.generate(blank, most=most)[0],
    )


def blanked(pixels: Tensor) -> Tensor:
    """Every pixel the picture's mean colour."""
    return pixels.mean((2, 3), keepdim=True).expand_as(pixels).contiguous()


def continued(inputs: dict[str, Tensor], answer: Sequence[int]) -> dict[str, Tensor]:
    """The row [1, n] with the answer behind it."""
    ids, seen = inputs["input_ids"], inputs["attention_mask"]
    more = ids.new_tensor([list(answer)])
    return {
        **inputs,
        "input_ids": torch.cat([ids, more], 1),
        "attention_mask": torch.cat([seen, torch.ones_like(more)], 1),
    }


def layout(seeing: Seeing, inputs: dict[str, Tensor]) -> Layout:
    """ValueError where tokens of the picture are not one to a patch, in rows (a class token before them may stand)."""
    at = seeing.is_image(inputs["input_ids"][0]).nonzero()[:, 0]
    height, width = inputs["pixel_values"].shape[2:]
    size = int(seeing.model.config.vision_config.patch_size)
    rows, columns = height // size, width // size
    before = len(at) - rows * columns
    if before not in (0, 1) or int(at[-1]) - int(at[0]) + 1 != len(at):
        raise ValueError(
            f"{seeing.name} makes {len(at)} tokens of {rows} x {columns} patches: maps want one token for each patch"
        )
    return Layout(int(at[0]) + before, rows, columns)


def _rows(answer: Sequence[int]) -> slice:
    """The places whose next token is one of the answer's."""
    return slice(-len(answer) - 1, -1)


def _probabilities(logits: Tensor, answer: Sequence[int]) -> Tensor:
    """[k]"""
    chosen = torch.tensor(list(answer), device=logits.device)[:, None]
    return logits[0, _rows(answer)].double().softmax(-1).gather(1, chosen)[:, 0]


def _traced(
    seeing: Seeing, inputs: dict[str, Tensor], answer: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """attention, edges, sources, probabilities, and head outputs [k, layers, heads, e]: one pass, and one backward for
    every token of the answer."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kept.append(kwargs["inputs_embeds"].detach().requires_grad_())
        return args, {**kwargs, "inputs_embeds": kept[0]}

    model = seeing.model
    hook = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.enable_grad(), record(model, stack=STACK, kind="self", gradients=True) as made:
            logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    _finite(seeing, logits)
    chosen = torch.tensor(list(answer), device=logits.device)
    told = logits[0, _rows(answer)].double().log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    layers = [opened(call, "explain") for call in made]
    n, k = inputs["input_ids"].shape[1], len(answer)
    outputs = [call.output for call in layers]
    attention, edges, sources = [], [], []
    for number in range(k):
        at = n - k - 1 + number
        row = slice(at, at + 1)
        found = torch.autograd.grad(told[number], [kept[0], *outputs], retain_graph=number < k - 1)
        sources.append((found[0] * kept[0]).detach().sum(-1)[0].double())
        weights = torch.stack([call.weights(rows=row)[0, :, 0].detach() for call in layers]).double()
        slopes = torch.stack(
            [_slopes(call, own[:, :, row]) for call, own in zip(layers, found[1:], strict=True)]
        ).double()
        attention.append(weights)
        edges.append(weights * slopes)
    seen = torch.stack([call.output[0, :, _rows(answer)].detach() for call in layers]).double()
    return (
        torch.stack(attention),
        torch.stack(edges),
        torch.stack(sources),
        told.detach().exp(),
        seen.permute(2, 0, 1, 3),
    )


def _slopes(call: Any, upstream: Tensor) -> Tensor:
    """d log p / d weights of one row, [h, m]: the gradient at the heads' output times the values."""
    values = call.of_heads(call.value, range(call.heads)).detach()
    return (upstream @ values.transpose(2, 3))[0, :, 0]


@torch.no_grad()
def _outputs(seeing: Seeing, inputs: dict[str, Tensor], answer: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Probabilities [k], and head outputs [k, layers, heads, e] at the places that say the answer."""
    with record(seeing.model, stack=STACK, kind="self") as calls:
        logits = seeing.model(**inputs, use_cache=False).logits
    found = torch.stack([opened(call, "explain").output[0, :, _rows(answer)] for call in calls]).double()
    return _probabilities(logits, answer), found.permute(2, 0, 1, 3)


def _finite(seeing: Seeing, logits: Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{seeing.name} gives NaN or infinite logits for this input: its weights are damaged")


def token_divergence(divergence: Tensor, share: float = 0.5) -> Tensor:
    """T-VHD of arXiv 2412.13949, [k]: the sum over layers of the most divergent heads' VHD (so large a share of each
    layer's heads, at least one). divergence: [k, layers, heads]. A small value tells a token of the prior."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share}; want a share of a layer's heads, above 0 and at most 1")
    most = max(1, math.floor(share * divergence.shape[-1]))
    return divergence.topk(most, -1).values.sum((-1, -2))
