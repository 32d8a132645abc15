"""Whether a decoder-only model looks less at its source, and hangs less on it, the longer the target is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from manyheads.explain.detectors.spans import span_mass
from manyheads.explain.studies.drawing import chart, strip_plot
from manyheads.explain.studies.models import ModelStudy
from manyheads.explain.studies.study import Cell, Point, Verdict, always, both_ways, paired, register_study, said
from manyheads.hosts.probes import Inputs
from manyheads.tasks.draw import generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot


def source_sensitivity(
    model: nn.Module, ids: Tensor, source: int, spans: Sequence[tuple[int, int]], *, seed: int = 0, **beside: Any
) -> list[float]:
    """How much of what the outputs of each span (start, stop) hang on is the source, ids[:source] of ids [n]: 0 to 1.

        |d (u . h_span) / d E_source|^2 / |d (u . h_span) / d E|^2,  h the last hidden states, E the embeddings

    u: random and the same for all spans of a length, so that this is the share of the squared Frobenius norms of the
    Jacobians in the mean over draws. beside: what the model is called with besides, such as token_kinds.
    """
    n = ids.shape[-1]
    if ids.dim() != 1 or not 0 < source < n or any(not source <= a < b <= n for a, b in spans):
        raise ValueError(
            f"source={source}, spans={list(spans)} of ids {list(ids.shape)}; want source < start < stop <= n"
        )
    embeds = model.get_input_embeddings()(ids[None].to(next(model.parameters()).device)).detach()  # type: ignore[operator]
    shares = []
    with torch.enable_grad():
        embeds.requires_grad_()
        out = model(inputs_embeds=embeds, output_hidden_states=True, use_cache=False, **beside)
        hidden = out.hidden_states[-1][0]
        for start, stop in spans:
            u = torch.randn(stop - start, hidden.shape[-1], generator=torch.Generator().manual_seed(seed))
            grad = torch.autograd.grad((hidden[start:stop] * u.to(hidden)).sum(), embeds, retain_graph=True)[0][0]
            moved = grad.double().square().sum(-1)
            shares.append(float(moved[:source].sum() / moved.sum().clamp_min(torch.finfo(torch.float64).tiny)))
    return shares


@register_study
@dataclass(frozen=True)
class SourceAttention(ModelStudy):
    """Fu et al., Decoder-Only or Encoder-Decoder? Interpreting Language Model as a Regularized Encoder-Decoder,
    arXiv:2304.04052.

    A text goes on from its source. Measured for each stretch of the target: the mass of its rows on the source
    (`span_mass`, mean over layers and heads), and the source's share in what its outputs hang on, by the Jacobian of
    the last hidden states (`source_sensitivity`).
    Divergence: the paper bounds the sensitivity of one attention from its weights; here it is measured through the
    whole model, with residual streams and MLPs. Texts in place of translations.
    """

    name = "source-attention"
    title = "Attention on the source, the longer the target"
    claim = "The longer the target is, the less its tokens look at the source and hang on it (attention degeneration)."
    reference = "arXiv:2304.04052"
    simplified = "A text that goes on in place of a source and its translation, and a small model."
    columns: ClassVar[Mapping[str, str]] = {"mass": "mass on it", "chance": "by chance", "share": "sensitivity to it"}

    model: str = ""
    source: int = 64
    stretches: int = 4
    stretch: int = 32

    def points(self) -> list[Point]:
        return [{"label": "first stretch", "stretch_of": "first"}, {"label": "last stretch", "stretch_of": "last"}]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        many = 1 if point["stretch_of"] == "first" else self.stretches
        inputs = Inputs(self.loaded, seed=generator(self.name, seed).initial_seed())
        texts = inputs.windows(self.source + self.stretches * self.stretch, 16)
        ids = texts[seed % len(texts)]
        spans = [(self.source + i * self.stretch, self.source + (i + 1) * self.stretch) for i in range(many)]
        with torch.no_grad():
            found = [span_mass(self.loaded, ids[:stop], [(0, self.source)], (start, stop)) for start, stop in spans]
        shares = source_sensitivity(self.loaded.model, ids, self.source, spans, seed=seed)
        curve = [
            {"tokens": start - self.source, "mass": float(own.relevance[0]), "share": share}
            for own, share, (start, _) in zip(found, shares, spans, strict=True)
        ]
        return {**curve[-1], "chance": float(found[-1].chance[0]), "curve": curve}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        first, last = {"stretch_of": "first"}, {"stretch_of": "last"}
        mass, share = (paired(cells, key, first, last) for key in ("mass", "share"))
        lines = (
            said("Mass on the source in the first stretch, against the last", mass),
            said("Sensitivity to the source in the first stretch, against the last", share),
        )
        return Verdict(both_ways([always(mass), always(share)]), {}, lines)

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        from manyheads.runs.charts import Plot

        found = []
        for key, up in (("mass", "mass on the source"), ("share", "sensitivity to the source")):
            rows = [{"condition": f"seed {cell['seed']}", "seed": cell["seed"], **row} for cell in cells
                    if cell["stretch_of"] == "last" for row in cell["curve"]]  # fmt: skip
            if rows:
                drawn = chart(rows, "tokens", key, across="tokens behind the source", up=up)
                found.append(Plot(key, up.capitalize(), "By how many tokens of the target came before.", drawn))
        return found + strip_plot(cells, "share", "First and last", "The source's share.", "share")
