"""BAM: checkpoints of one shape as experts. Equal experts are the model, unequal ones what loops over them say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.cli import main
from manyheads.convert.hosted import hosted
from manyheads.convert.upcycled import check_tokenizers, upcycled
from manyheads.hosts.loading import Loaded, load_model
from manyheads.models import ManyheadsConfig

SIZES = {
    "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 2,
    "intermediate_size": 20, "vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "sliding_window": None,
}  # fmt: skip
IDS = torch.tensor([list(range(1, 13)), list(range(12, 0, -1))])


def tiny(kind: str = "llama", seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, **more).logits


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"attention_bias": True}), ("qwen2", {}), ("qwen3", {}), ("phi3", {}),
        ("gemma2", {"sliding_window": 4}), ("gemma3_text", {"sliding_window": 4}),
    ],
)  # fmt: skip
def test_experts_that_are_all_the_same_are_the_model(kind: str, more: dict[str, Any], share: bool) -> None:
    model = tiny(kind, **more)
    made, alone = upcycled([model] * 3, share_kv=share), hosted(model)
    torch.testing.assert_close(logits(made), logits(alone))
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-5, atol=1e-5)  # its angles are in float32
    with torch.no_grad():
        for layer in made.model.stack.layers:
            layer.self_attn.mechanism.router.weight.normal_(0, 9.0)
            layer.mlp.router.weight.normal_(0, 9.0)
    torch.testing.assert_close(logits(made), logits(alone))


def mean_of(models: list[Any], name: str) -> Tensor:
    return torch.stack([model.get_parameter(name) for model in models]).mean(0)


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def by_loops(models: list[Any], made: Any, row: Tensor, share: bool) -> Tensor:
    """The first layer over one row, without positions: expert by expert, with the experts' own modules."""
    x = normed(row, mean_of(models, "model.layers.0.input_layernorm.weight"))
    block, n = made.model.stack.layers[0], len(row)
    gates = (x @ block.self_attn.mechanism.router.weight.T).softmax(-1)
    for e, model in enumerate(models):
        own = model.model.layers[0].self_attn
        keys, values = (
            mean_of(models, f"model.layers.0.self_attn.{part}_proj.weight")
            if share
            else getattr(own, f"{part}_proj").weight
            for part in "kv"
        )
        q, k, v = (x @ own.q_proj.weight.T).split(6, -1), (x @ keys.T).split(6, -1), (x @ values.T).split(6, -1)
        heads = []
        for h in range(4):
            scores = (q[h] @ k[h // 2].T / 6**0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[h // 2])
        row = row + gates[:, e, None] * (torch.cat(heads, -1) @ own.o_proj.weight.T)
    y = normed(row, mean_of(models, "model.layers.0.post_attention_layernorm.weight"))
    scores = y @ block.mlp.router.weight.T
    out = row.clone()
    for i in range(n):
        best = sorted(range(len(models)), key=lambda e: -float(scores[i, e]))[:2]
        shares = scores[i, best].softmax(-1)
        for share_of, e in zip(shares, best, strict=True):
            out[i] += share_of * models[e].model.layers[0].mlp(y[i])
    return out


@pytest.mark.parametrize("share", [False, True])
def test_a_block_of_unlike_experts_equals_loops(share: bool) -> None:
    models = [tiny(seed=seed) for seed in range(3)]
    made = upcycled(models, share_kv=share)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    block = made.model.stack.layers[0]
    block.self_attn.mechanism.rotary = None  # positions are the shell's, and tested there
    with torch.no_grad():
        torch.testing.assert_close(block(x)[0], torch.stack([by_loops(models, made, row, share) for row in x]))


@pytest.mark.parametrize("share", [False, True])
def test_decoding_with_a_cache_and_left_padding_equal_the_full_pass(share: bool) -> None:
    made = upcycled([tiny(seed=seed) for seed in range(2)], share_kv=share)
    whole, cache, parts = logits(made), None, []
    with torch.no_grad():
        for step in IDS.split([5, 1, 4, 1, 1], 1):
            out = made(step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
        mask = (padded > 0).long()
        left = made(padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(left, whole)
    heads = {"own": 4, "shared": 2}["shared" if share else "own"]
    assert made.model.stack.layers[0].self_attn.mechanism.kv_heads == heads


def test_routers_learn_and_the_balance_of_the_mlps_is_in_the_loss() -> None:
    made = upcycled([tiny(seed=seed) for seed in range(2)], active=1).train()
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    seen: list[Tensor] = []
    hooks = [
        layer.mlp.norm.register_forward_hook(lambda *given: seen.append(given[2])) for layer in made.model.stack.layers
    ]
    out = made(IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100), use_cache=False)
    for hook in hooks:
        hook.remove()
    out.loss.backward()
    want = 0.0
    for layer, states in zip(made.model.stack.layers, seen[::2], strict=True):  # normed for the loss, and for the MLPs
        scores = (states[mask.bool()] @ layer.mlp.router.weight.T).softmax(-1).tolist()
        share = [sum(row[e] for row in scores) / len(scores) for e in range(2)]
        load = [sum(row[e] == max(row) for row in scores) / len(scores) for e in range(2)]
        want += 2 * sum(p * f for p, f in zip(share, load, strict=True))
        for router in (layer.mlp.router, layer.self_attn.mechanism.router):
            assert router.weight.grad.abs().max() > 0
    assert out.aux_loss.item() == pytest.approx(want)


def test_experts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok=3 of num_local_experts=2"):
        ManyheadsConfig(num_local_experts=2, num_experts_per_tok=3)
    with pytest.raises(ValueError, match="intermediate_size=0 has none"):
        ManyheadsConfig(num_local_experts=2, intermediate_size=0)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["convert", *arguments])
    return int(end.value.code or 0)


def test_three_folders_become_one_that_opens_again(tmp_path: Path, halved: str) -> None:
    model = load_model(halved).model
    noise = torch.Generator().manual_seed(0)
    for name in "abc":
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * parameter.std() * torch.randn(parameter.shape, generator=noise))
    small = ["--windows", "1", "--keys", "1", "--length", "96"]
    folders, out = [str(tmp_path / name) for name in "abc"], tmp_path / "out"
    assert run(*folders, "--to", "bam", "--share-kv", *small, "--out", str(out)) == 0
    assert run("check", str(out)) == 0
    made = load_model(out).model
    assert [spec["experts"] for spec in made.config.layers] == [3] * 2
    want = upcycled([load_model(folder).model for folder in folders], share_kv=True)
    ids = torch.tensor([list(b"def attend(query, key):")])
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, want(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "bam"], "several checkpoints, and 1 was given"),
        (["--share-kv"], "--share-kv belongs to --to bam"),
        (["--to", "hedgehog", "--active", "2"], "--active belongs to a mechanism"),
        (["A", "A", "--to", "bam", "--active", "3"], "--active 3: want 1 to 2"),
        (["A", "A", "--to", "bam", "--budget-bytes", "64"], "--budget-bytes does not go with --to bam"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_model().model.save_pretrained(tmp_path / "A")
    given = [str(tmp_path / "A") if one == "A" else one for one in arguments]
    assert run(*given, "--out", str(tmp_path / "out")) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_shapes_and_other_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="intermediate_size is 20 in the first and 16 in model 2"):
        upcycled([tiny(), tiny(intermediate_size=16)])

    class Words:
        def __init__(self, words: dict[str, int]) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return self.words

    first = Loaded(None, Words({"a": 0, "b": 1}), "first")
    check_tokenizers([first, Loaded(None, Words({"b": 1, "a": 0}), "second")])
    with pytest.raises(ValueError, match="tokenizers of first and second differ"):
        check_tokenizers([first, Loaded(None, Words({"a": 1, "b": 0}), "second")])
    with pytest.raises(ValueError, match="tokenizers of first and bytes differ"):
        check_tokenizers([first, Loaded(None, None, "bytes")])
