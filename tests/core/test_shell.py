"""Layers of published models fit into the shell exactly, and every mechanism of the shell takes their sizes."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from manyheads import Mechanism, Rotary, Shell, create_attention, list_attentions, mechanism_class
from manyheads.testing import examine_mechanism

SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "vocab_size": 32,
    "attn_implementation": "eager",
    "pad_token_id": 0,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 2.0,
        "beta_slow": 1.0,
    },
}
HOSTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {}),
    ("llama", {"attention_bias": True}, {"bias": {"q": True, "k": True, "v": True, "o": True}}),
    ("mistral", {}, {}),
    ("qwen2", {}, {"bias": {"q": True, "k": True, "v": True}}),
    ("qwen3", {"rms_norm_eps": 1e-3}, {"qk_norm": "head", "norm_eps": 1e-3}),
    ("olmo2", {"rms_norm_eps": 1e-3}, {"qk_norm": "whole", "norm_eps": 1e-3}),
    ("gemma", {}, {}),
]


def host(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **more})
    model = AutoModel.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def filled(module: Mechanism, attention: Any) -> Mechanism:
    """With the weights of a host's attention, whose names are ours."""
    module.load_state_dict(attention.state_dict())
    return module.double().eval()


@pytest.mark.parametrize(("kind", "config", "shell"), HOSTS, ids=[f"{k}-{n}" for n, (k, _, _) in enumerate(HOSTS)])
@torch.no_grad()
def test_a_layer_of_a_decoder_fits(kind: str, config: dict[str, Any], shell: dict[str, Any]) -> None:
    model = host(kind, rope_parameters=ROPES["default"], **config)
    attention = model.layers[0].self_attn
    head_dim = attention.head_dim
    ours = create_attention(
        "softmax",
        24,
        4,
        causal=True,
        rotary={"base": 500.0},
        shell={"head_dim": head_dim, "kv_heads": 2, **shell},
    )
    filled(ours, attention)
    x = torch.randn(2, 7, 24).double()
    places = torch.arange(7)[None]
    past = torch.full((7, 7), -torch.inf).triu(1).double()[None, None]
    wanted = attention(x, position_embeddings=model.rotary_emb(x, places), attention_mask=past)[0]
    torch.testing.assert_close(ours(x).output, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_a_scaled_rotation_fits(rope: str) -> None:
    model = host("llama", rope_parameters=ROPES[rope], max_position_embeddings=64)
    angles, amplitude = model.rotary_emb.inv_freq, model.rotary_emb.attention_scaling
    rotary = Rotary(angles=angles.tolist(), amplitude=amplitude)
    ours = create_attention("softmax", 24, 4, causal=True, rotary=rotary, shell={"head_dim": 10, "kv_heads": 2})
    again = create_attention("softmax", **json.loads(json.dumps(ours.config)))
    x = torch.randn(1, 40, 24).double()
    past = torch.full((40, 40), -torch.inf).triu(1).double()[None, None]
    attention = model.layers[0].self_attn
    wanted = attention(x, position_embeddings=model.rotary_emb(x, torch.arange(40)[None]), attention_mask=past)[0]
    # The host makes its angles in float32.
    for module in (ours, again):
        torch.testing.assert_close(filled(module, attention)(x).output, wanted, rtol=1e-5, atol=1e-5)
    assert rope in ("default", *ROPE_INIT_FUNCTIONS)


@torch.no_grad()
def test_a_layer_of_a_vit_fits() -> None:
    torch.manual_seed(0)
    sizes = {k: SIZES[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")}
    model = AutoModel.from_config(AutoConfig.for_model("vit", image_size=8, patch_size=4, **sizes)).double().eval()
    attention = model.encoder.layer[0].attention if hasattr(model, "encoder") else model.layers[0].attention
    state = {
        name: tensor
        for key, tensor in attention.state_dict().items()
        for name in [f"{SHORT[key.split('.')[-2]]}_proj.{key.rsplit('.', 1)[-1]}"]
    }
    ours = create_attention("softmax", 24, 4, bias=True)
    ours.load_state_dict(state)
    x = torch.randn(2, 7, 24).double()
    result = attention(x)
    wanted = result[0] if isinstance(result, tuple) else result
    torch.testing.assert_close(ours.double().eval()(x).output, wanted, rtol=1e-6, atol=1e-6)


SHORT = {
    "query": "q",
    "key": "k",
    "value": "v",
    "dense": "o",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
}

HOSTING = [name for name in list_attentions() if "shell" in mechanism_class(name).__init__.__signature__.parameters]
OWN = {"head_dim": 6, "qk_norm": "head", "bias": {"q": True}, "scale": 0.3}
HELD = [
    "shapes", "no-future", "padding", "left-padding", "decode", "weights", "gradients", "round-trip", "reorder",
    "not-softmax", "deterministic", "refuses",
]  # fmt: skip


def test_most_mechanisms_of_the_shell_host() -> None:
    assert len(HOSTING) >= 24
    assert {"softmax", "gqa", "shaw", "mswa", "entmax", "music-transformer"} <= set(HOSTING)


@pytest.mark.parametrize("name", HOSTING)
def test_every_mechanism_of_the_shell_takes_a_hosts_sizes(name: str) -> None:
    findings = list(examine_mechanism(mechanism_class(name), properties=HELD, config={"shell": OWN}, largest=5))
    assert len(findings) > 5
    failures = [f"{f.pattern} {f.property}: {f.message}" for f in findings if not f.holds]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", HOSTING)
def test_shared_key_heads_are_taken_or_refused_by_name(name: str) -> None:
    cls = mechanism_class(name)
    config = {"shell": {"kv_heads": 2}} | ({"kv_heads": None} if "kv_heads" in cls.card.example else {})
    if name == "mqa" or not cls.shares_kv:
        with pytest.raises(ValueError, match=f"{name}: "):
            cls(16, 4, **{**cls.card.example, **config, "causal": sorted(cls.card.patterns)[0].causal})
        return
    findings = list(
        examine_mechanism(cls, properties=["shapes", "weights", "decode", "padding"], config=config, largest=5)
    )
    failures = [f"{f.pattern} {f.property}: {f.message}" for f in findings if not f.holds]
    assert findings
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        ({"heads": 2}, "want a Shell, or a mapping with some of"),
        ({"head_dim": 0}, "head_dim=0 must be positive"),
        ({"head_dim": 2.0}, "head_dim=2.0; want an integer"),
        ({"qk_norm": "layer"}, "want one of"),
        ({"bias": {"x": True}}, "True or False for some of"),
        ({"bias": {"q": 1}}, "True or False for some of"),
        ({"kv_heads": 3}, "not a multiple of kv_heads=3"),
        ({"scale": float("nan")}, "scale=nan; want a finite number"),
        (3, "want a Shell"),
    ],
)
def test_what_is_no_shell_is_refused(shell: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_attention("shaw", 16, 4, shell=shell)


def test_a_shell_and_an_argument_must_not_differ() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        create_attention("softmax", 16, 4, kv_heads=1, shell=Shell(kv_heads=2))
    with pytest.raises(ValueError, match="no argument 'shell'"):
        create_attention("optimised", 16, 4, shell=Shell(head_dim=2))


def test_a_context_of_another_width() -> None:
    module = create_attention("softmax", 16, 4, shell=Shell(source_dim=10))
    assert module(torch.randn(2, 3, 16), torch.randn(2, 5, 10)).output.shape == (2, 3, 16)
    with pytest.raises(ValueError, match="built for a context of 10 features; context is missing"):
        module(torch.randn(2, 3, 16))
    with pytest.raises(ValueError, match="context has shape"):
        module(torch.randn(2, 3, 16), torch.randn(2, 5, 16))


CAPPED = {"softcap": 0.7, "window": 3}


@pytest.mark.parametrize("name", [n for n in HOSTING if "causal-self" in mechanism_class(n).card.patterns])
def test_a_cap_and_a_window_are_gone_by_in_every_pass_or_refused_by_name(name: str) -> None:
    cls = mechanism_class(name)
    held = {part: size for part, size in CAPPED.items() if cls.has_place(part)}
    for part in CAPPED.keys() - held.keys():
        with pytest.raises(ValueError, match=f"{name}: has no scores of the shell's, and no place for {part}"):
            cls(16, 4, **{**cls.card.example, "causal": True, "shell": {part: CAPPED[part]}})
    checked = ["no-future", "padding", "left-padding", "decode", "weights", "refuses"]
    findings = list(
        examine_mechanism(cls, patterns=["causal-self"], properties=checked, config={"shell": held}, largest=9)
    )
    failures = [f"{f.pattern} {f.property}: {f.message}" for f in findings if not f.holds]
    assert not failures, "\n".join(failures)


SELF = {"causal-self", "noncausal-self"}


@pytest.mark.parametrize("name", [n for n in HOSTING if SELF & mechanism_class(n).card.patterns])
@torch.no_grad()
def test_a_norm_before_the_last_projection_is_on_all_that_passes_or_refused_by_name(name: str) -> None:
    cls = mechanism_class(name)
    causal = "causal-self" in cls.card.patterns
    arguments = {"dim": 16, "heads": 4, **cls.card.example, "causal": causal, "shell": {"out_norm": True}}
    if not cls.has_place("out_norm"):
        with pytest.raises(ValueError, match=f"{name}: has no output of the shell's, and no place for out_norm"):
            cls(**arguments)
        return
    module = cls(**arguments).eval()
    x = torch.randn(1, 6, module.dim)
    inputs = module.example_inputs(6)
    assert module(x, **inputs).output.abs().max() > 0
    module.out_norm.weight.zero_()
    module.o_proj.bias = None
    assert module(x, **inputs).output.abs().max() == 0


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("shell", [{"window": 3}, {"softcap": 0.7}, CAPPED, {"window": 40}])
@torch.no_grad()
def test_a_cap_and_a_window_as_loops(shell: dict[str, Any], kv_heads: int) -> None:
    torch.manual_seed(0)
    ours = create_attention("softmax", 16, 4, causal=True, kv_heads=kv_heads, shell=shell).double().eval()
    x, real = torch.randn(2, 21, 16).double(), torch.ones(2, 21, dtype=torch.bool)
    real[1, :6] = False
    result, window, cap = ours(x, mask=real).output, shell.get("window", 99), shell.get("softcap")
    q, k, v = (linear(x).unflatten(-1, (-1, 4)) for linear in (ours.q_proj, ours.k_proj, ours.v_proj))
    wanted = torch.zeros(2, 21, 4, 4).double()
    for b in range(2):
        for h in range(4):
            g = h // (4 // kv_heads)
            for i in range(21):
                near = [j for j in range(max(0, i - window + 1), i + 1) if real[b, j]]
                scores = torch.stack([q[b, i, h] @ k[b, j, g] / 2 for j in near]) if near else torch.zeros(0).double()
                scores = cap * torch.tanh(scores / cap) if cap else scores
                for weight, j in zip(scores.softmax(0), near, strict=True):
                    wanted[b, i, h] += weight * v[b, j, g]
    torch.testing.assert_close(result, ours.o_proj(wanted.flatten(-2)))
    torch.testing.assert_close(ours(x, mask=real, need_weights=True).output, result)


def test_a_state_holds_a_window_and_no_more() -> None:
    ours = create_attention("softmax", 16, 4, causal=True, shell={"window": 3})
    state = ours.init_state(1)
    for _ in range(200):
        ours(torch.randn(1, 1, 16), state=state)
    assert ours.span == 3
    assert state.nbytes < 30 * 2 * 16 * 4
    with pytest.raises(ValueError, match="window=3 is of causal layers"):
        create_attention("softmax", 16, 4, shell={"window": 3})
    with pytest.raises(ValueError, match="window=0 must be positive"):
        create_attention("softmax", 16, 4, causal=True, shell={"window": 0})
