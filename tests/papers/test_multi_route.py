"""Mr. DETR's routes against loops on a tiny DETR, its matching against loops, and a few steps of training."""

import math

import pytest
import torch
from small_hosts import detr, llama

from manyheads.hosts.taps import record
from manyheads.training import MultiRoute, one_to_many


def batch(rows=2):
    generator = torch.Generator().manual_seed(3)
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.3, 0.3, 0.3], [0.7, 0.6, 0.4, 0.5]])},
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.6, 0.4]])},
    ]
    return {"pixel_values": torch.rand(rows, 3, 32, 32, generator=generator), "labels": labels[:rows]}


def attended_by_loops(attention, tokens, places, x, at):
    """Instructive self attention of one row x [n, d]: outputs of the tokens dropped."""
    count, d = len(tokens), attention.head_dim
    rows = [*tokens, *x]
    spots = [t + p for t, p in zip(tokens, places, strict=True)] + [t + p for t, p in zip(x, at, strict=True)]
    q, k = ([project(row) for row in spots] for project in (attention.q_proj, attention.k_proj))
    v = [attention.v_proj(row) for row in rows]
    out = []
    for i in range(count, len(rows)):
        joined = []
        for head in range(4):
            part = slice(head * d, head * d + d)
            scores = [math.exp(q[i][part] @ k[j][part] / math.sqrt(d)) for j in range(len(rows))]
            joined.append(sum(s / sum(scores) * v[j][part] for j, s in enumerate(scores)))
        out.append(attention.o_proj(torch.cat(joined)))
    return torch.stack(out)


@torch.no_grad()
def test_a_layer_of_the_instructive_route_by_loops():
    routes = MultiRoute(detr(), instructions=3).double()
    layer, x, at = routes.model.model.decoder.layers[1], *torch.randn(2, 2, 12, 32).double()
    memory = torch.randn(2, 5, 32).double()
    routes.norms[1].weight.mul_(2)
    with routes._hooked("instructive"):
        found = layer(x, None, None, at, memory)
    for row in range(2):
        own = attended_by_loops(layer.self_attn, routes.tokens[1], routes.places[1], x[row], at[row])
        y = routes.norms[1](x[row] + own)[None]
        crossed = layer.encoder_attn(y, memory[row : row + 1], position_embeddings=at[row : row + 1])[0]
        y = layer.encoder_attn_layer_norm(y + crossed)
        torch.testing.assert_close(found[row], layer.final_layer_norm(y + layer.mlp(y))[0])
    plain = layer(x, None, None, at, memory)
    routes.feed_forwards[1].fc1.weight.zero_()
    routes.feed_forwards[1].fc2.weight.zero_()
    with routes._hooked("feed_forward"):
        found = layer(x, None, None, at, memory)
    assert (found - plain).abs().max() > 1e-3
    torch.testing.assert_close(layer(x, None, None, at, memory), plain)  # the hooks are gone


@torch.no_grad()
def test_queries_that_are_masked_stay_so_beside_the_tokens():
    routes = MultiRoute(detr(), instructions=3)
    inputs, seen = batch(), torch.ones(2, 12, dtype=torch.long)
    seen[:, 7:] = 0
    given = {}
    hook = routes.model.model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    routes.model(inputs["pixel_values"], decoder_attention_mask=seen)
    hook.remove()
    with record(routes.model, stack="decoder", kind="self") as calls:
        routes.run("instructive", **given)
    weights = calls[0].weights()
    assert weights.shape[-2:] == (15, 15)
    # What the tokens themselves see is dropped with their outputs.
    assert (weights[..., 3:, :10] > 0).all()
    assert (weights[..., 3:, 10:] == 0).all()


def matched_by_loops(chances, boxes, labels, targets, k, threshold, share):
    def corners(box):
        return box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2

    def iou(one, two):
        a, b = corners(one), corners(two)
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        both = max(width, 0) * max(height, 0)
        return both / (one[2] * one[3] + two[2] * two[3] - both)

    score = [
        [float(share * iou(t, box) + (1 - share) * p[label]) for box, p in zip(boxes, chances, strict=True)]
        for t, label in zip(targets, labels, strict=True)
    ]
    pairs = []
    for t in range(len(labels)):
        mine = []
        for i in range(len(boxes)):
            column = [row[i] for row in score]
            good = column[t] >= threshold or any(row[i] == max(row) for row in score)
            if column[t] == max(column) and good:
                mine.append((column[t], i))
        pairs += [(i, t) for _, i in sorted(mine, reverse=True)[:k]]
    return pairs


def test_matching_by_loops():
    for seed in range(5):
        torch.manual_seed(seed)
        boxes, targets = torch.rand(9, 4).double() * 0.5 + 0.2, torch.rand(3, 4).double() * 0.5 + 0.2
        chances, labels = torch.randn(9, 4).double().softmax(-1), torch.tensor([2, 0, 1])
        queries, owners = one_to_many(chances, boxes, labels, targets, k=2, threshold=0.3, box_share=0.7)
        wanted = matched_by_loops(chances, boxes, labels, targets, 2, 0.3, 0.7)
        assert list(zip(queries.tolist(), owners.tolist(), strict=True)) == wanted
    none = one_to_many(chances, boxes, labels[:0], targets[:0])
    assert [len(each) for each in none] == [0, 0]


@torch.no_grad()
def test_eval_and_a_pass_without_labels_are_the_model():
    model, inputs = detr().eval(), batch()
    routes = MultiRoute(model, instructions=3)
    for mode in (False, True):
        routes.train(mode)
        picture = inputs["pixel_values"]
        torch.testing.assert_close(routes(picture).logits, model(picture).logits)
    routes.eval()
    torch.testing.assert_close(routes(**inputs).loss, model(**inputs).loss)


@pytest.mark.parametrize("every_layer", [False, True])
def test_the_loss_is_the_sum_of_the_routes_and_one_to_one_is_untouched(every_layer):
    model, inputs = detr(auxiliary_loss=every_layer).train(), batch()
    routes = MultiRoute(model, instructions=3).train()
    plain, out = model(**inputs), routes(**inputs)
    torch.testing.assert_close(out.logits, plain.logits)
    share = {
        "loss_ce": 1,
        "loss_bbox": model.config.bbox_loss_coefficient,
        "loss_giou": model.config.giou_loss_coefficient,
    }
    extra = sum(
        share[name.split("/")[1].removesuffix("_0")] * value for name, value in out.loss_dict.items() if "/" in name
    )
    assert len([name for name in out.loss_dict if "/" in name]) == (12 if every_layer else 6)
    torch.testing.assert_close(out.loss, plain.loss + extra)
    out.loss.backward()
    assert all(own.grad is not None and own.grad.isfinite().all() for own in (routes.tokens, routes.places))
    assert all(own.grad is not None for part in (routes.norms, routes.feed_forwards) for own in part.parameters())


def test_a_few_steps_of_training():
    """All three routes learn; the one that is left is the model, which then does without the others."""
    torch.manual_seed(0)
    model, inputs = detr().train(), batch()
    routes = MultiRoute(model, instructions=3).train()
    optimiser, seen = torch.optim.AdamW(routes.parameters(), 2e-3), []
    for _ in range(15):
        out = routes(**inputs)
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
        seen.append({name: value.item() for name, value in out.loss_dict.items() if name.endswith("loss_giou")})
    for name in ("loss_giou", "instructive/loss_giou", "feed_forward/loss_giou"):
        assert seen[-1][name] < seen[0][name]
    torch.testing.assert_close(routes.eval()(**inputs).loss, model(**inputs).loss)


def test_an_image_without_boxes_and_refusals():
    routes, inputs = MultiRoute(detr(), instructions=3).train(), batch()
    inputs["labels"][1] = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    assert routes(**inputs).loss.isfinite()
    with pytest.raises(ValueError, match="LlamaForCausalLM is not laid out as DETR"):
        MultiRoute(llama())
    with pytest.raises(ValueError, match="instructions=0"):
        MultiRoute(detr(), instructions=0)
    for layer in routes.model.model.decoder.layers:
        layer.gradient_checkpointing = True
    with pytest.raises(ValueError, match="checkpoints its decoder"):
        routes(**inputs)
