"""Published image models, by the names that people know them by, as layouts of our parts.

Each is the published model to the last parameter for 1,000 labels. Where every cell is normed before the mean
(FocalNet, Twins, VAN, EMO), the norm stands at the end of the last stage; stochastic depth is left out, and so are the
extra losses of token labelling in training (VOLO, SpectFormer), whose logits are those of evaluation in any case.
halonet_h1 is the smallest of the paper, in timm's form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from manyheads.models.configuration import ManyheadsConfig
from manyheads.near import suggest


def _step(features: int | None, kernel: int, stride: int, padding: int = 0, **more: Any) -> dict[str, Any]:
    return {"features": features, "kernel": kernel, "stride": stride, "padding": padding, **more}


def _mambaout(depths: tuple[int, ...]) -> dict[str, Any]:
    stem = [_step(24, 3, 2, 1, after="layer", act="gelu"), _step(48, 3, 2, 1, after="layer")]
    stages = [
        {"dim": dim, "depth": depth, "mixers": ["mambaout"], "whole": True}
        | ({"down": _step(dim, 3, 2, 1, after="layer")} if i else {})
        for i, (dim, depth) in enumerate(zip((48, 96, 192, 288), depths, strict=True))
    ]
    return {"stem": stem, "stages": stages, "head": {"hidden": 4 * 288, "act": "gelu", "norm_hidden": True}}


def _van_b0() -> dict[str, Any]:
    stages = [
        {
            "dim": dim,
            "depth": depth,
            "mixers": ["large-kernel-attention"],
            "norm": "batch",
            "mlp": "convolved",
            "mlp_ratio": ratio,
            "layer_scale": 0.01,
            "norm_end": "layer",
        }
        | ({"down": _step(dim, 3, 2, 1, after="batch")} if i else {})
        for i, (dim, depth, ratio) in enumerate(zip((32, 64, 160, 256), (3, 3, 5, 2), (8, 8, 4, 4), strict=True))
    ]
    return {"stem": [_step(32, 7, 4, 3, after="batch")], "stages": stages, "head": {"norm": "none"}}


def _focalnet_tiny(levels: int) -> dict[str, Any]:
    stages = [
        {"dim": dim, "depth": depth, "mixers": [{"name": "focal-modulation", "levels": levels, "window": 3}]}
        | {"norm_eps": 1e-5}
        | ({"down": _step(dim, 2, 2, after="layer", norm_eps=1e-5)} if i else {})
        for i, (dim, depth) in enumerate(zip((96, 192, 384, 768), (2, 2, 6, 2), strict=True))
    ]
    stages[-1]["norm_end"] = "layer"
    return {"stem": [_step(96, 4, 4, after="layer", norm_eps=1e-5)], "stages": stages, "head": {"norm": "none"}}


def _davit_tiny() -> dict[str, Any]:
    stages = [
        {"dim": dim, "depth": 2 * pairs, "heads": heads, "mixers": ["davit-spatial", "davit-channel"], "whole": True}
        | ({"down": _step(dim, 2, 2, before="layer", norm_eps=1e-5)} if i else {})
        for i, (dim, pairs, heads) in enumerate(zip((96, 192, 384, 768), (1, 1, 3, 1), (3, 6, 12, 24), strict=True))
    ]
    return {"stem": [_step(96, 7, 4, 3, after="layer", norm_eps=1e-5)], "stages": stages, "head": {"norm_eps": 1e-5}}


def _twins_svt_small() -> dict[str, Any]:
    sizes = zip((64, 128, 256, 512), (2, 2, 10, 4), (2, 4, 8, 16), (8, 4, 2, 1), strict=True)
    stages = [
        {"dim": dim, "depth": depth, "heads": heads}
        | {"mixers": ["twins-local", {"name": "twins-global", "reduce": reduce}]}
        for dim, depth, heads, reduce in sizes
    ]
    return _twins(stages)


def _twins_pcpvt_small() -> dict[str, Any]:
    sizes = zip((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), (8, 4, 2, 1), (8, 8, 4, 4), strict=True)
    stages = [
        {"dim": dim, "depth": depth, "heads": heads, "mlp_ratio": ratio}
        | {"mixers": [{"name": "twins-global", "reduce": reduce}]}
        for dim, depth, heads, reduce, ratio in sizes
    ]
    return _twins(stages)


def _twins(stages: list[dict[str, Any]]) -> dict[str, Any]:
    for i, stage in enumerate(stages):
        stage["between"] = "twins-position"
        if i:
            stage["down"] = _step(stage["dim"], 2, 2, after="layer", norm_eps=1e-5)
    stages[-1]["norm_end"] = "layer"
    return {"stem": [_step(64, 4, 4, after="layer", norm_eps=1e-5)], "stages": stages, "head": {"norm": "none"}}


# Attention whose output alone has a bias, as in the vision transformers that were written without one in q, k and v.
_PLAIN = {"name": "softmax", "shell": {"bias": {"o": True}}}


def _convit_tiny() -> dict[str, Any]:
    stage = {"dim": 192, "depth": 10, "heads": 4, "mixers": ["convit"], "positions": [14, 14]}
    head = {"token": {"depth": 2, "heads": 4, "moves": "all"}}
    return {"stem": [_step(192, 16, 16)], "stages": [stage], "head": head}


def _volo_d1() -> dict[str, Any]:
    stem = [_step(64, 7, 2, 3, after="batch", act="relu", bias=False)]
    stem += [_step(64, 3, 1, 1, after="batch", act="relu", bias=False) for _ in range(2)] + [_step(192, 4, 4)]
    outlook = {"dim": 192, "depth": 4, "heads": 6, "mixers": [{"name": "volo", "stride": 2}]}
    plain = {"dim": 384, "depth": 14, "heads": 12, "mixers": [_PLAIN], "down": _step(384, 2, 2), "positions": [14, 14]}
    token = {"depth": 2, "heads": 12, "mlp_ratio": 3.0, "dense": True}
    return {
        "stem": stem,
        "stages": [{**stage, "mlp_ratio": 3.0, "norm_eps": 1e-5} for stage in (outlook, plain)],
        "head": {"norm_eps": 1e-5, "token": token},
    }


def _spectformer_h_s() -> dict[str, Any]:
    stem = [_step(32, 7, 2, 3, after="batch", act="relu", bias=False)]
    stem += [_step(32, 3, 1, 1, after="batch", act="relu", bias=False) for _ in range(2)]
    stem += [_step(64, 3, 2, 1, after="layer", norm_eps=1e-5)]
    gates = [{"name": "spectformer", "alpha": 1, "height": side, "width": side} for side in (56, 28)]
    sizes = zip((64, 128, 320, 448), (3, 4, 6, 3), (2, 4, 10, 14), (8, 8, 4, 4), strict=True)
    stages = [
        {"dim": dim, "depth": depth, "heads": heads, "mlp": "convolved", "mlp_ratio": ratio}
        | {"mixers": [gates[i] if i < 2 else {"name": "softmax", "bias": True}]}
        | {"norm_end": "layer" if i < 3 else "none"}
        | ({"down": _step(dim, 3, 2, 1, after="layer", norm_eps=1e-5)} if i else {})
        for i, (dim, depth, heads, ratio) in enumerate(sizes)
    ]
    token = {"heads": 14, "mlp_ratio": 4.0, "bias": True, "begins": "mean", "dense": True}
    return {"stem": stem, "stages": stages, "head": {"token": token}}


def _nextvit_small() -> dict[str, Any]:
    def blocks(stride: int, reduce: int, features: int, plain: int, last: int = 0) -> list[dict[str, Any]]:
        found = [{"name": "next-vit-convolution", "heads": features // 32, "features": features} for _ in range(plain)]
        if last:
            found.append({"name": "next-vit", "heads": last // 32, "features": last, "reduce": reduce})
        found[0]["stride"] = stride
        return found

    third = blocks(2, 2, 384, 4, 512)
    mixers = [blocks(1, 8, 96, 3), blocks(2, 4, 192, 3, 256), third + blocks(1, 2, 384, 4, 512)]
    mixers.append(blocks(2, 1, 768, 2, 1024))
    stem = [
        _step(width, 3, stride, 1, after="batch", act="relu", bias=False)
        for width, stride in zip((64, 32, 64, 64), (2, 1, 1, 2), strict=True)
    ]
    stages = [{"dim": own[-1]["features"], "depth": len(own), "mixers": own, "whole": True} for own in mixers]
    return {"stem": stem, "stages": stages, "head": {"norm": "batch"}}


def _emo2(
    depths: tuple[int, ...], dims: tuple[int, ...], ratios: tuple[float, ...], head_dims: tuple[int, ...]
) -> dict[str, Any]:
    before = dims[0] // 2
    stem = [
        _step(before, 3, 2, 1, after="batch", norm_eps=1e-6, act="silu"),
        _step(before, 3, 1, 1, after="batch", norm_eps=1e-6, act="silu", bias=False, groups=before),
        _step(before, 1, 1, bias=False),
    ]
    stages = []
    for i, (depth, dim, ratio, head_dim) in enumerate(zip(depths, dims, ratios, head_dims, strict=True)):
        shared: dict[str, Any] = {"name": "emov2", "early": i < 2}
        first = {**shared, "heads": 1, "features": dim, "stride": 2, "operator": "none", "expansion": 2 * ratio}
        later = {**shared, "heads": dim // head_dim, "operator": "none" if i < 2 else "both", "expansion": ratio}
        stages.append({"dim": dim, "depth": depth, "whole": True, "mixers": [first, *[later] * (depth - 1)]})
    stages[-1]["norm_end"] = "layer"
    return {"stem": stem, "stages": stages, "head": {"norm": "none"}}


def _litv2_small() -> dict[str, Any]:
    sizes = zip((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24), (None, None, 2, 1), strict=True)
    stages = [
        {"dim": dim, "depth": depth, "heads": heads, "mlp": "convolved", "norm_eps": 1e-5}
        | {"mixers": ["none"] if window is None else [{"name": "hilo", "alpha": 0.9, "window": window, "bias": True}]}
        | ({"down": _step(dim, 2, 2, after="batch", act="gelu", deforms=True)} if i else {})
        for i, (dim, depth, heads, window) in enumerate(sizes)
    ]
    stages[-1]["norm_end"] = "layer"
    return {"stem": [_step(96, 4, 4, after="layer", norm_eps=1e-5)], "stages": stages, "head": {"norm": "none"}}


def _halonet_h1() -> dict[str, Any]:
    def halo(stride: int) -> dict[str, Any]:
        return {"name": "halonet", "block": 8, "halo": 3, "stride": stride}

    stages = [
        {"dim": dim, "depth": depth, "heads": 8, "bottleneck": 1.0}
        | {"mixers": [halo(2 if i else 1), *[halo(1)] * (depth - 1)]}
        for i, (dim, depth) in enumerate(zip((64, 128, 256, 512), (3, 3, 10, 3), strict=True))
    ]
    stem = [_step(64, 7, 2, 3, after="batch", act="relu", bias=False, pool=True)]
    return {"stem": stem, "stages": stages, "head": {"norm": "none"}}


def _maxvit_tiny() -> dict[str, Any]:
    stem = [_step(64, 3, 2, 1, after="batch", act="gelu"), _step(64, 3, 1, 1)]
    stages = [
        {"dim": dim, "depth": depth, "heads": dim // 32, "whole": True}
        | {"mixers": [{"name": "maxvit", "stride": 2, "features": dim}, *["maxvit"] * (depth - 1)]}
        for dim, depth in zip((64, 128, 256, 512), (2, 2, 5, 2), strict=True)
    ]
    return {"stem": stem, "stages": stages, "head": {"hidden": 512, "act": "tanh", "norm_eps": 1e-5}}


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "convit_tiny": _convit_tiny,
    "davit_tiny": _davit_tiny,
    "emo2_1m": partial(_emo2, (2, 2, 8, 3), (32, 48, 80, 180), (2.0, 2.5, 3.0, 3.5), (16, 16, 20, 20)),
    "emo2_2m": partial(_emo2, (3, 3, 9, 3), (32, 48, 120, 200), (2.0, 2.5, 3.0, 3.5), (16, 16, 20, 20)),
    "emo2_5m": partial(_emo2, (3, 3, 9, 3), (48, 72, 160, 288), (2.0, 3.0, 4.0, 4.0), (16, 24, 32, 32)),
    "focalnet_tiny_lrf": partial(_focalnet_tiny, 3),
    "focalnet_tiny_srf": partial(_focalnet_tiny, 2),
    "halonet_h1": _halonet_h1,
    "litv2_small": _litv2_small,
    "mambaout_femto": partial(_mambaout, (3, 3, 9, 3)),
    "mambaout_kobe": partial(_mambaout, (3, 3, 15, 3)),
    "maxvit_tiny": _maxvit_tiny,
    "nextvit_small": _nextvit_small,
    "spectformer_h_s": _spectformer_h_s,
    "twins_pcpvt_small": _twins_pcpvt_small,
    "twins_svt_small": _twins_svt_small,
    "van_b0": _van_b0,
    "volo_d1": _volo_d1,
}


def preset_config(name: str, **settings: Any) -> ManyheadsConfig:
    """The configuration of a published image model, for ManyheadsForImageClassification.

    settings: of ManyheadsConfig, such as num_labels (1,000 by default) or image_size. Raises ValueError for a name that
    is not in PRESETS.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{suggest(name, list(PRESETS))}; want one of {sorted(PRESETS)}")
    given = {"num_labels": 1000, **settings}
    return ManyheadsConfig(stages=copy.deepcopy(PRESETS[name]()), **given)
