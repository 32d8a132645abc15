"""Attributions: which tokens a model's answer rests on, in captum's manner of call, and how faithful each is.

Rollout(model).attribute(inputs, target=...)       # [b, n]
compare_attributions(model, inputs, target)        # all methods with deletion, insertion and rank correlation
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from manyheads.explain.attributions.attention_gradient import AttentionGradient
from manyheads.explain.attributions.base import Attribution
from manyheads.explain.attributions.chance import Chance
from manyheads.explain.attributions.faithfulness import (
    Comparison,
    Curve,
    Faithfulness,
    compare_attributions,
    deletion_curve,
    insertion_curve,
    leave_one_out,
    rank_correlation,
)
from manyheads.explain.attributions.feature_maps import MapGradCAM
from manyheads.explain.attributions.flow import Flow
from manyheads.explain.attributions.grad_cam import GradCAM
from manyheads.explain.attributions.gradients import InputGradient, IntegratedGradients, Saliency
from manyheads.explain.attributions.grid import token_grid
from manyheads.explain.attributions.layerwise import LayerwiseRelevance, salient_relevance
from manyheads.explain.attributions.logit_flow import LogitFlow, LogitParts
from manyheads.explain.attributions.raw import RawAttention
from manyheads.explain.attributions.relevance import Relevance
from manyheads.explain.attributions.rollout import GradientRollout, Rollout, rollout
from manyheads.explain.attributions.value_norm import ValueNorm

# Name -> the method with its defaults, of a model and a score or None.
METHODS: dict[str, Callable[[Any, Any], Attribution]] = {
    "raw-attention": lambda model, score: RawAttention(model, score=score),
    "rollout": lambda model, score: Rollout(model, score=score),
    "gradient-rollout": lambda model, score: GradientRollout(model, score=score),
    "flow": lambda model, score: Flow(model, score=score),
    "value-norm": lambda model, score: ValueNorm(model, score=score),
    "attention-gradient": lambda model, score: AttentionGradient(model, score=score),
    "relevance": lambda model, score: Relevance(model, score=score),
    "grad-cam": lambda model, score: GradCAM(model, score=score),
    "attention-grad-cam": lambda model, score: GradCAM(model, over="attention", score=score),
    "logit-flow": lambda model, score: LogitFlow(model, score=score),
    "saliency": lambda model, score: Saliency(model, score=score),
    "input-gradient": lambda model, score: InputGradient(model, score=score),
    "integrated-gradients": lambda model, score: IntegratedGradients(model, score=score),
    "random": lambda model, score: Chance(model, score=score),
}

__all__ = [
    "METHODS",
    "AttentionGradient",
    "Attribution",
    "Chance",
    "Comparison",
    "Curve",
    "Faithfulness",
    "Flow",
    "GradCAM",
    "GradientRollout",
    "InputGradient",
    "IntegratedGradients",
    "LayerwiseRelevance",
    "LogitFlow",
    "LogitParts",
    "MapGradCAM",
    "RawAttention",
    "Relevance",
    "Rollout",
    "Saliency",
    "ValueNorm",
    "compare_attributions",
    "deletion_curve",
    "insertion_curve",
    "leave_one_out",
    "rank_correlation",
    "rollout",
    "salient_relevance",
    "token_grid",
]
