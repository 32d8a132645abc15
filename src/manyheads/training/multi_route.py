"""Mr. DETR: a detection decoder trained along three routes, of which one is left at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# A route -> hooks on a decoder layer, by the number of the layer.
ROUTES = ("instructive", "feed_forward")


class MultiRoute(nn.Module):
    """A DETR whose decoder, in training, runs twice more over the same image, queries and heads, for many boxes each:

        one to one      the model as it is, and its own loss; all that is left in eval mode
        instructive     self attention with learnt tokens T, P before the queries, and a norm of its own after it:
                        q = k = [T + P; x + pos],  v = [T; x];  the outputs of T are dropped
        feed_forward    a feed-forward part of its own in each layer
        loss = loss_1to1 + loss_instructive + loss_feed_forward

    Called as the model is; the output is the model's, its `loss` the sum and `loss_dict` with the routes' parts beside
    the model's, as "instructive/loss_ce". The routes' losses are the model's (cross entropy with a class for nothing,
    L1 and GIoU boxes, its coefficients, each layer's where it has auxiliary_loss), with `one_to_many` in place of the
    Hungarian matching. `model` stays as it was: what the routes add is this module's, and is thrown away at the end.
    The norm and feed-forward parts start as copies of the model's, which suits trained ones; T, P as N(0, 1).

    Source: Zhang et al., Mr. DETR, arXiv:2412.10028, and its released CustomMultiheadAttention and criterion (10
    tokens, k = 6). There the hosts are deformable detectors with focal losses, and the matching is DAC-DETR's by name;
    the file was not read. A mask over queries is widened by the tokens, which all may see. ValueError: hosts whose
    decoder is laid out otherwise (deformable, conditional), gradient checkpointing, which would run a layer again
    outside of its route.
    """

    def __init__(
        self, model: nn.Module, *, instructions: int = 10, k: int = 6, threshold: float = 0.4, box_share: float = 0.7
    ) -> None:
        super().__init__()
        self.model: Any
        if instructions < 1 or k < 1 or not 0 <= threshold <= 1 or not 0 <= box_share <= 1:
            raise ValueError(
                f"MultiRoute: instructions={instructions}, k={k}, threshold={threshold}, box_share={box_share}; want "
                "at least 1 of the first two, and shares from 0 to 1"
            )
        self.model = model
        self.k, self.threshold, self.box_share = k, threshold, box_share
        layers = _layers(model)
        like = next(layers[0].self_attn.parameters())
        sizes = len(layers), instructions, layers[0].self_attn_layer_norm.normalized_shape[0]
        self.tokens = nn.Parameter(torch.randn(sizes, device=like.device, dtype=like.dtype))
        self.places = nn.Parameter(torch.randn(sizes, device=like.device, dtype=like.dtype))
        self.norms = nn.ModuleList(copy.deepcopy(layer.self_attn_layer_norm) for layer in layers)
        self.feed_forwards = nn.ModuleList(copy.deepcopy(layer.mlp) for layer in layers)

    def forward(self, *args: Any, labels: list[dict[str, Tensor]] | None = None, **kwargs: Any) -> Any:
        """As the model's, with its targets by name (labels=); without labels, or in eval mode, it is the model's."""
        if labels is None or not self.training:
            return self.model(*args, labels=labels, **kwargs)
        decoder = self.model.model.decoder
        if any(getattr(part, "gradient_checkpointing", False) for part in decoder.modules()):
            raise ValueError(
                f"MultiRoute: {type(self.model).__name__} checkpoints its decoder, whose layers backward would run "
                "again outside of their route: disable gradient checkpointing"
            )
        given: dict[str, Any] = {}
        hook = decoder.register_forward_pre_hook(
            lambda module, positional, named: given.update(args=positional, kwargs=dict(named)), with_kwargs=True
        )
        try:
            out = self.model(*args, labels=labels, return_dict=True, **kwargs)
        finally:
            hook.remove()
        out.loss_dict = dict(out.loss_dict)
        for route in ROUTES:
            loss, parts = self._loss(self.run(route, *given["args"], **given["kwargs"]), labels)
            out.loss = out.loss + loss
            out.loss_dict.update({f"{route}/{name}": value for name, value in parts.items()})
        return out

    def run(self, route: str, *args: Any, **kwargs: Any) -> list[dict[str, Tensor]]:
        """What the heads make of the decoder along a route, "logits" and "pred_boxes" for the last layer, and for the
        others before it where the model has auxiliary_loss; the last layer's comes last."""
        if route not in ROUTES:
            raise ValueError(f"MultiRoute: route={route!r}; want one of {ROUTES}")
        with self._hooked(route):
            found = self.model.model.decoder(*args, **kwargs)
        states = [found.last_hidden_state]
        if found.intermediate_hidden_states is not None:
            states = [*found.intermediate_hidden_states[:-1], *states]
        return [
            {
                "logits": self.model.class_labels_classifier(state),
                "pred_boxes": self.model.bbox_predictor(state).sigmoid(),
            }
            for state in states
        ]

    @contextmanager
    def _hooked(self, route: str) -> Iterator[None]:
        with ExitStack() as stack:
            for number, layer in enumerate(_layers(self.model)):
                if route == "feed_forward":
                    own = _instead(self.feed_forwards[number])
                    stack.callback(layer.mlp.register_forward_hook(own).remove)
                    continue
                before, after = self._instructed(number)
                stack.callback(layer.self_attn.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.self_attn.register_forward_hook(after).remove)
                own = _instead(self.norms[number])
                stack.callback(layer.self_attn_layer_norm.register_forward_hook(own).remove)
            yield

    def _instructed(self, number: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        count = self.tokens.shape[1]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            x, at, mask = (kwargs.get(name) for name in ("hidden_states", "position_embeddings", "attention_mask"))
            assert x is not None
            assert at is not None
            tokens, places = (each[number].expand(len(x), -1, -1) for each in (self.tokens, self.places))
            wide = {"hidden_states": torch.cat([tokens, x], 1), "position_embeddings": torch.cat([places, at], 1)}
            if mask is not None:
                seen = True if mask.dtype == torch.bool else 0.0
                mask = nn.functional.pad(mask, (count, 0, count, 0), value=seen)
            return args, {**kwargs, **wide, "attention_mask": mask}

        def after(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
            return (output[0][:, count:], *output[1:])

        return before, after

    def _loss(
        self, outputs: list[dict[str, Tensor]], labels: list[dict[str, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's own loss of every layer, over boxes that are matched one to many; summed, and in its parts."""
        from transformers.loss.loss_for_object_detection import ImageLoss

        config, device = self.model.config, self.tokens.device
        loss_of = ImageLoss(self._matched, config.num_labels, config.eos_coefficient, ["labels", "boxes"]).to(device)
        share = {"loss_ce": 1.0, "loss_bbox": config.bbox_loss_coefficient, "loss_giou": config.giou_loss_coefficient}
        total, parts = torch.zeros((), device=device), {}
        for number, output in enumerate(outputs):
            last = number == len(outputs) - 1
            for name, value in loss_of({key: each.float() for key, each in output.items()}, labels).items():
                total = total + share[name] * value
                parts[name if last else f"{name}_{number}"] = value.detach()
        return total, parts

    def _matched(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        chances = outputs["logits"].detach().softmax(-1)
        return [
            one_to_many(
                own,
                boxes,
                target["class_labels"],
                target["boxes"],
                k=self.k,
                threshold=self.threshold,
                box_share=self.box_share,
            )
            for own, boxes, target in zip(chances, outputs["pred_boxes"].detach(), targets, strict=True)
        ]


def one_to_many(
    chances: Tensor,
    boxes: Tensor,
    labels: Tensor,
    targets: Tensor,
    *,
    k: int = 6,
    threshold: float = 0.4,
    box_share: float = 0.7,
) -> tuple[Tensor, Tensor]:
    """Which queries are taken for which target, of one image: queries and targets, side by side.

        s(t, i) = box_share IoU(box_i, target_t) + (1 - box_share) p_i(label_t)

    A query belongs to the target where its s is highest, if that is at least `threshold` or no query's s is higher for
    that target; of those of a target, the k highest are taken. chances [n, classes] p, boxes [n, 4] and targets [t, 4]
    as (centre x, centre y, width, height), labels [t]. A target whose best query suits another better may get none."""
    if not len(labels):
        none = torch.zeros(0, dtype=torch.long, device=boxes.device)
        return none, none
    score = box_share * _iou(targets.to(boxes), boxes) + (1 - box_share) * chances[:, labels].T
    best, whose = score.max(0)
    positive = (best >= threshold) | (score == score.amax(1, keepdim=True)).any(0)
    queries, owners = [], []
    for target in range(len(labels)):
        own = (positive & (whose == target)).nonzero()[:, 0]
        own = own[score[target, own].argsort(descending=True, stable=True)[:k]]
        queries.append(own)
        owners.append(torch.full_like(own, target))
    return torch.cat(queries), torch.cat(owners)


def _iou(left: Tensor, right: Tensor) -> Tensor:
    """[t, 4] and [n, 4] as (centre, size) -> [t, n]"""
    (a, a_size), (b, b_size) = (each.split(2, -1) for each in (left[:, None], right[None]))
    low, high = torch.maximum(a - a_size / 2, b - b_size / 2), torch.minimum(a + a_size / 2, b + b_size / 2)
    shared = (high - low).clamp_min(0).prod(-1)
    return shared / (a_size.prod(-1) + b_size.prod(-1) - shared).clamp_min(torch.finfo(shared.dtype).tiny)


def _instead(own: nn.Module) -> Callable[..., Any]:
    """A hook that gives what another module makes of the same input."""
    return lambda module, args, output: own(*args)


def _layers(model: Any) -> list[Any]:
    """The decoder's layers of a model that is laid out as DETR is; ValueError by name for others."""
    decoder = getattr(getattr(model, "model", None), "decoder", None)
    layers = list(getattr(decoder, "layers", []))
    wanted = ("self_attn", "self_attn_layer_norm", "encoder_attn", "mlp")
    heads = getattr(model, "class_labels_classifier", None), getattr(model, "bbox_predictor", None)
    classes = getattr(heads[0], "out_features", None)
    if (
        not layers
        or None in heads
        or any(not hasattr(layer, name) for layer in layers for name in wanted)
        or classes != model.config.num_labels + 1
    ):
        raise ValueError(
            f"MultiRoute: {type(model).__name__} is not laid out as DETR is: want a model.decoder whose layers have "
            f"{', '.join(wanted)}, and a class_labels_classifier with a class for nothing beside a bbox_predictor"
        )
    return layers
