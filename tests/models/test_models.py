"""Saving, training, masks, classification, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCAB, causal_lm, of_tokens, randomised, seq2seq, single_source, spec, tiny, tokens
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from manyheads import Card, Family, Mechanism, Result, card, list_attentions, registry
from manyheads.mechanism import Call
from manyheads.models import (
    ManyheadsConfig,
    ManyheadsForCausalLM,
    ManyheadsForImageClassification,
    ManyheadsForSeq2SeqLM,
    ManyheadsForSequenceClassification,
    ManyheadsModel,
    ManyheadsSeq2SeqModel,
)

CAUSAL = of_tokens("causal-self")
SELF = sorted({*CAUSAL, *of_tokens("noncausal-self")})
IMAGES = sorted({*SELF, *list_attentions(pattern="grid")})
CROSS = [name for name in of_tokens("causal-cross") if single_source(name)]
POOLS = of_tokens("pool")


def classifier(*names: str, **settings: Any) -> ManyheadsForSequenceClassification:
    return randomised(ManyheadsForSequenceClassification(tiny(*names, num_labels=3, **settings)))


def image_classifier(*names: str, **settings: Any) -> ManyheadsForImageClassification:
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 3}
    return randomised(ManyheadsForImageClassification(tiny(*names, **{**sizes, **settings})))


def reloaded(model: Any, path: Path, auto: Any) -> Any:
    model.save_pretrained(path)
    files = {p.name for p in path.iterdir()}
    beside = {"open_manyheads.py", "README.md"}
    assert files <= beside | {"config.json", "generation_config.json", "model.safetensors"}
    again = auto.from_pretrained(path, dtype=torch.float64)
    assert type(again) is type(model)
    return again


def settings(config: ManyheadsConfig) -> dict[str, Any]:
    return config.to_dict() | {"_name_or_path": "", "architectures": None, "auto_map": None}


def assert_same_weights(found: nn.Module, wanted: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        left, right = dict(getattr(found, kind)()), dict(getattr(wanted, kind)())
        assert left.keys() == right.keys()
        for name, tensor in right.items():
            assert_close(left[name], tensor, rtol=0, atol=0, msg=name)


@pytest.fixture(autouse=True)
def _own_mechanisms(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Keeper, Router):
        monkeypatch.setitem(registry._registered, cls.card.name, cls)


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, ids = causal_lm(name, short_conv=3, positions="learned"), tokens(2, 9)
    again = reloaded(model, tmp_path, AutoModelForCausalLM)
    assert_same_weights(again, model)
    with torch.no_grad():
        assert_close(again(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)
    assert settings(again.config) == settings(model.config)


def test_every_head_is_saved_and_loaded(tmp_path: Path) -> None:
    ids, images = tokens(2, 6), torch.randn(2, 1, 8, 8).double()
    models = [
        (seq2seq("softmax"), AutoModelForSeq2SeqLM, {"input_ids": ids, "decoder_input_ids": ids}),
        (classifier("softmax", pooling=POOLS[0]), AutoModelForSequenceClassification, {"input_ids": ids}),
        (image_classifier("softmax"), AutoModelForImageClassification, {"pixel_values": images}),
        (randomised(ManyheadsModel(tiny("softmax"))), AutoModel, {"input_ids": ids}),
    ]
    for i, (model, auto, inputs) in enumerate(models):
        again = reloaded(model, tmp_path / str(i), auto)
        with torch.no_grad():
            assert_close(again(**inputs)[0], model(**inputs)[0], rtol=1e-12, atol=1e-12)


class Keeper(Mechanism):
    """Adds a table that no checkpoint holds and whose making needs values: y = W x + table + offset."""

    card = Card(
        name="test-keeper",
        title="t",
        reference="r",
        family=Family.PLAIN,
        patterns={"noncausal-self"},
        time="n",
        state="",
        decodes=False,
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.proj = nn.Linear(dim, dim)
        nn.init.orthogonal_(self.proj.weight)
        self.offset = nn.Parameter(torch.full((dim,), 0.25))
        self.register_buffer("table", torch.linspace(0, 1, dim), persistent=False)
        self.largest = float(self.table.max().item())

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        return Result(self.proj(x) + self.table * self.largest + self.offset)


def test_what_no_checkpoint_holds_is_made_anew(tmp_path: Path) -> None:
    model = ManyheadsForSequenceClassification(tiny("test-keeper", num_labels=2)).eval()
    again = reloaded(model, tmp_path, AutoModelForSequenceClassification)
    assert_close(again.model.stack.layers[0].self_attn.mechanism.table, torch.linspace(0, 1, 16).double())
    with torch.no_grad():
        assert_close(again(tokens(1, 5)).logits, model.double()(tokens(1, 5)).logits)
    half = ManyheadsForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.stack.layers[0].self_attn.mechanism.proj.weight.dtype == torch.bfloat16


def test_mechanisms_initialise_themselves(tmp_path: Path) -> None:
    """At construction, and where a checkpoint does not hold them."""
    body = ManyheadsModel(tiny("softmax", num_hidden_layers=1))
    body.save_pretrained(tmp_path)
    found = ManyheadsForSequenceClassification.from_pretrained(
        tmp_path, layers=["test-keeper"], num_hidden_layers=1, num_labels=2
    )
    for model in (found, ManyheadsForSequenceClassification(tiny("test-keeper"))):
        mechanism = model.model.stack.layers[0].self_attn.mechanism
        assert_close(mechanism.proj.weight @ mechanism.proj.weight.T, torch.eye(16), rtol=1e-4, atol=1e-4)
        assert_close(mechanism.offset, torch.full((16,), 0.25))
        assert model.classifier.weight.abs().max() < 0.3
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_construction_is_the_mechanisms_own() -> None:
    torch.manual_seed(1)
    once = ManyheadsForCausalLM(tiny("softmax"))
    torch.manual_seed(1)
    assert_same_weights(ManyheadsForCausalLM(tiny("softmax")), once)


def test_tied_embeddings_and_resizing(tmp_path: Path) -> None:
    model = causal_lm("softmax", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_weights(reloaded(model, tmp_path / "tied", AutoModelForCausalLM), model)
    before = model(tokens(1, 4)).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(VOCAB + 4)
    assert model.config.vocab_size == VOCAB + 4
    assert_close(model(tokens(1, 4)).logits[..., :VOCAB], before)
    assert_same_weights(reloaded(model, tmp_path / "resized", AutoModelForCausalLM), model)
    both = seq2seq("softmax", tie_word_embeddings=True)
    both.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    assert both.lm_head.weight is both.model.encoder.embed_tokens.weight
    assert both(tokens(1, 4), labels=tokens(1, 3)).logits.shape == (1, 3, VOCAB + 2)


def test_config_round_trip(tmp_path: Path) -> None:
    config = tiny("softmax", "aaren", num_labels=5, pooling=POOLS[0], image_size=[8, 16], patch_size=4, rotary_base=5e5)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, ManyheadsConfig)
    assert settings(again) == settings(config)
    assert again.layers == [spec("softmax"), spec("aaren")]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "manyheads"


# -- what the models compute -----------------------------------------------------------------------------------------


def test_a_layer_by_hand() -> None:
    """Pre-norm softmax with a rotary position, a short convolution and SwiGLU, from the model's own weights."""
    model, ids = causal_lm("softmax", num_hidden_layers=1, short_conv=3, rotary_base=50.0), tokens(1, 5)
    block, w = model.model.stack.layers[0], dict(model.named_parameters())
    norm = lambda x, m: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.weight  # noqa: E731
    with torch.no_grad():
        x = w["model.embed_tokens.weight"][ids]
        kernel = block.self_attn.convolution.weight[:, 0]
        y = norm(x, block.self_attn.norm)[0]
        rows = [sum(kernel[:, 2 - k] * y[t - k] for k in range(3) if t >= k) for t in range(5)]
        mechanism = block.self_attn.mechanism
        assert mechanism.rotary.base == 50.0
        x = x + mechanism(torch.stack(rows)[None]).output
        y = norm(x, block.mlp.norm)
        gate = y @ block.mlp.gate_proj.weight.T
        x = x + (gate * gate.sigmoid() * (y @ block.mlp.up_proj.weight.T)) @ block.mlp.down_proj.weight.T
        wanted = norm(x, model.model.stack.norm) @ w["lm_head.weight"].T
        assert_close(model(ids).logits, wanted)


def test_losses_follow_hugging_face() -> None:
    model, ids = causal_lm("softmax"), tokens(2, 7)
    labels = ids.masked_fill(torch.arange(7) < 2, -100)
    out = model(ids, labels=labels)
    terms = [-out.logits[b, t - 1].log_softmax(-1)[ids[b, t]] for b in range(2) for t in range(2, 7)]
    assert_close(out.loss.double(), torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)
    assert_close(model(ids, labels=labels, num_items_in_batch=40).loss * 4, out.loss)
    assert model(ids, labels=torch.full_like(ids, -100)).loss.item() == 0.0
    both = seq2seq("softmax")
    out = both(ids, labels=labels)
    terms = [-out.logits[b, t].log_softmax(-1)[ids[b, t]] for b in range(2) for t in range(2, 7)]
    assert_close(out.loss.double(), torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)
    shifted = torch.cat([torch.ones(2, 1, dtype=torch.long), labels[:, :-1].masked_fill(labels[:, :-1] < 0, 0)], 1)
    assert_close(both(ids, decoder_input_ids=shifted).logits, out.logits)


class Router(Mechanism):
    """An identity with an auxiliary loss of 2 in training and out of it."""

    card = Card(
        name="test-router",
        title="t",
        reference="r",
        family=Family.PLAIN,
        patterns={"causal-self"},
        time="n",
        state="",
        decodes=False,
    )

    def __init__(self, dim: int, heads: int, *, causal: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        return Result(x, None, {"balance": x.new_tensor(1.5), "z": x.new_tensor(0.5)})


def test_auxiliary_losses_are_added() -> None:
    for model, inputs in (
        (causal_lm("test-router"), {"input_ids": tokens(2, 4), "labels": tokens(2, 4)}),
        (classifier("test-router"), {"input_ids": tokens(2, 4), "labels": torch.tensor([0, 2])}),
        (image_classifier("test-router"), {"pixel_values": torch.randn(2, 1, 8, 8), "labels": torch.tensor([0, 2])}),
    ):
        model.config.router_loss_weight = 0.0
        plain = model(**inputs)
        model.config.router_loss_weight = 0.1
        out = model(**inputs)
        assert_close(out.aux_loss, torch.tensor(4.0).double())
        assert_close((out.loss - plain.loss).double(), torch.tensor(0.4).double(), rtol=1e-5, atol=1e-5)
    model = causal_lm("test-router")
    shared = model(tokens(2, 4), labels=tokens(2, 4), num_items_in_batch=12).loss
    assert_close(2 * shared, model(tokens(2, 4), labels=tokens(2, 4)).loss)


def test_a_mechanism_that_cannot_decode_generates_without_a_cache() -> None:
    model, ids = causal_lm("softmax", "test-router"), tokens(2, 4)
    found = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert found.past_key_values is None
    assert model(ids).past_key_values is None
    with pytest.raises(ValueError, match=r"layer 1, test-router.*use_cache=False"):
        model(ids, use_cache=True)


def test_mixed_layers() -> None:
    names = [n for n in CAUSAL if "dim" not in card(n).example]
    model, ids = causal_lm(*names, short_conv=2), tokens(2, 8)
    assert [b.self_attn.mechanism.card.name for b in model.model.stack.layers] == names
    found = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert found.tolist() == wanted.tolist()
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", SELF)
def test_sequence_classification_ignores_padding(name: str) -> None:
    model, ids = classifier(name, short_conv=3), tokens(2, 7)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    out = model(ids, mask, labels=torch.tensor([2, 0]))
    assert_close(out.logits[1], model(ids[1:, :4]).logits[0])
    assert_close(model(ids.masked_fill(mask == 0, 5), mask).logits, out.logits)
    out.loss.backward()
    causal = model.model.stack.layers[0].self_attn.mechanism.causal
    assert causal == ("noncausal-self" not in card(name).patterns)


@pytest.mark.parametrize("name", POOLS)
def test_pools(name: str) -> None:
    model, ids = classifier("softmax", pooling=spec(name)), tokens(2, 7)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    assert_close(model(ids, mask).logits[1], model(ids[1:, :4]).logits[0])


@pytest.mark.parametrize("name", IMAGES)
def test_image_classification(name: str) -> None:
    model, images = image_classifier(name, positions="learned"), torch.randn(2, 1, 8, 8).double()
    out = model(images, labels=torch.tensor([1, 2]), output_hidden_states=True)
    assert out.logits.shape == (2, 3)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 16, 16)] * 3
    out.loss.backward()
    assert (model.stack.layers[0].self_attn.grid is not None) == ("grid" in card(name).patterns)
    other = images.clone()
    other[0, 0, 0, 0] += 1
    moved = (model(other).logits - out.logits).abs().sum(-1)
    assert moved[0] > 1e-9
    assert moved[1] == 0


def test_patches_are_squares_of_pixels() -> None:
    model = image_classifier("softmax", num_channels=2, image_size=[4, 6])
    images = torch.arange(48.0).view(1, 2, 4, 6).double()
    found = model._patches(images)
    assert found.shape == (1, 2, 3, 8)
    wanted = [images[0, c, 2 + i, 4 + j] for c in range(2) for i in range(2) for j in range(2)]
    assert found[0, 1, 2].tolist() == [float(v) for v in wanted]
    with pytest.raises(ValueError, match=r"want \[batch, 2, 4, 6\]"):
        model(images[:, :1])


@pytest.mark.parametrize("cross", CROSS)
def test_encoder_decoder_masks(cross: str) -> None:
    model, ids, labels = seq2seq(cross), tokens(2, 6), tokens(2, 5, seed=1)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    out = model(ids, mask, labels=labels)
    assert_close(model(ids[1:, :4], labels=labels[1:]).logits[0], out.logits[1])
    later = model(ids, mask, decoder_input_ids=torch.cat([labels[:, :3], tokens(2, 2, seed=9)], 1)).logits
    assert_close(later[:, :3], model(ids, mask, decoder_input_ids=labels).logits[:, :3])
    loose = out.loss
    loose.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_decoder_that_sees_all_its_tokens() -> None:
    model, ids, queries = seq2seq("softmax", decoder_causal=False), tokens(2, 6), tokens(2, 4, seed=1)
    changed = torch.cat([queries[:, :3], queries[:, 3:] % 7 + 8], 1)
    before, after = model(ids, decoder_input_ids=queries).logits, model(ids, decoder_input_ids=changed).logits
    assert bool(((before - after)[:, 0].abs() > 1e-9).any())
    assert model(ids, decoder_input_ids=queries, labels=queries).loss.ndim == 0
    with pytest.raises(ValueError, match="give decoder_input_ids"):
        model(ids, labels=queries)
    with pytest.raises(ValueError, match="no order to generate in"):
        model.generate(ids, max_new_tokens=2)


def test_weights_and_hidden_states_on_request() -> None:
    model, ids = causal_lm("softmax", "aaren"), tokens(2, 5)
    out = model(ids, output_attentions=True, output_hidden_states=True)
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 5, 5)] * 2
    assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 5).double())
    assert len(out.hidden_states) == 3
    assert_close(out.hidden_states[0], model.model.embed_tokens(ids))
    assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert isinstance(model(ids, return_dict=False), tuple)
    both = seq2seq("softmax")(ids, decoder_input_ids=tokens(2, 3), output_attentions=True)
    assert [tuple(a.shape) for a in both.cross_attentions] == [(2, 4, 3, 5)] * 2
    assert len(both.encoder_attentions) == len(both.decoder_attentions) == 2


def test_dense_masks_and_embeddings_in() -> None:
    model, ids = causal_lm("softmax"), tokens(2, 6)
    blocks = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    blocks[..., :3, :3] = blocks[..., 3:, 3:] = True
    found = model(ids, blocks.expand(2, 1, 6, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]])).logits
    assert_close(found[:, 3:], model(ids[:, 3:]).logits)
    assert_close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)
    assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_positions() -> None:
    ids = tokens(1, 5)
    rotary = causal_lm("softmax", "mla").model.stack.layers
    assert rotary[0].self_attn.mechanism.rotary is not None
    assert "rotary" not in rotary[1].self_attn.mechanism.config
    own = causal_lm(layers=[{"name": "softmax", "rotary": {"base": 7.0}}]).model.stack.layers[0].self_attn.mechanism
    assert own.rotary.base == 7.0
    none = causal_lm("softmax", positions="none", num_hidden_layers=1)
    assert none.model.stack.layers[0].self_attn.mechanism.rotary is None
    swapped = ids[:, [1, 0, 2, 3, 4]]
    assert_close(none(ids).logits[:, -1], none(swapped).logits[:, -1])
    learned = causal_lm("softmax", positions="learned", num_hidden_layers=1)
    assert bool((learned(ids).logits - learned(swapped).logits)[:, -1].abs().max() > 1e-6)
    assert seq2seq("softmax").model.decoder.layers[0].cross_attn.mechanism.rotary is None


def test_heads_can_differ_by_layer() -> None:
    model = causal_lm(layers=[{"name": "softmax", "heads": 2}, "softmax"])
    assert [b.self_attn.mechanism.heads for b in model.model.stack.layers] == [2, 4]


# From 5.19 on transformers calls it activation checkpointing; the older name works from the floor on.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing() -> None:
    model, ids = causal_lm("softmax", "aaren").train(), tokens(2, 6)
    model(ids, labels=ids).loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, wanted[name], msg=name)


# -- the tools around ------------------------------------------------------------------------------------------------


class Copies(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: torch.tensor(i % 3) if key == "label" else tokens(6, seed=i) for key in self.keys}


@pytest.mark.parametrize("head", ["causal", "seq2seq", "classifier"])
def test_trainer(head: str, tmp_path: Path) -> None:
    config = tiny("softmax", num_labels=3)
    model: Any = {
        "causal": lambda: ManyheadsForCausalLM(config),
        "seq2seq": lambda: ManyheadsForSeq2SeqLM(tiny(is_encoder_decoder=True)),
        "classifier": lambda: ManyheadsForSequenceClassification(config),
    }[head]()
    before = model.get_input_embeddings().weight.detach().clone()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_strategy="no",
    )
    data = Copies(("input_ids", "label" if head == "classifier" else "labels"))
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert not before.equal(model.get_input_embeddings().weight)
    predictions = trainer.predict(data).predictions
    assert predictions.shape == ((8, 3) if head == "classifier" else (8, 6, VOCAB))
    assert_same_weights(type(model).from_pretrained(tmp_path / "checkpoint-2"), model)


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    model, ids = causal_lm("softmax"), tokens(4, 6)
    labels = ids.masked_fill(torch.arange(6) < torch.tensor([[0], [3], [1], [4]]), -100)
    count = (labels[:, 1:] != -100).sum()
    whole = model(ids, labels=labels).loss
    parts = [model(ids[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=count).loss for i in (0, 2)]
    assert_close(parts[0] + parts[1], whole)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
def test_lora(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base, ids = causal_lm("softmax", "gqa"), tokens(2, 5)
    wanted = base(ids).logits.detach()
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, lora).double().eval()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 8
    out = model(input_ids=ids, labels=ids)
    assert not out.logits.detach().equal(wanted)
    out.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in trained)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 8)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        assert_close(model(input_ids=ids).logits, wanted)
        clean = model.get_base_model()
    assert clean is base
    found = PeftModel.from_pretrained(model.unload(), tmp_path).double().eval()
    assert_close(found(input_ids=ids).logits, out.logits.detach(), rtol=1e-5, atol=1e-5)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tiny(layers=["sofmax"]), ["sofmax", "softmax"]),
        (lambda: tiny(layers=[{"name": "mswa", "windw": 3}]), ["layers[0]", "windw", "window"]),
        (lambda: tiny(layers=[{"window": 3}]), ["layers[0]", "name"]),
        (lambda: tiny(layers=[]), ["want a list"]),
        (lambda: ManyheadsConfig(layer="moba"), ["'layer'", "'layers'"]),
        (lambda: ManyheadsConfig(num_hidden_layer=2), ["'num_hidden_layer'", "'num_hidden_layers'"]),
        (lambda: ManyheadsConfig(num_key_value_heads=2), ["'num_key_value_heads'", "kv_heads"]),
        (lambda: ManyheadsConfig(rope_theta=5e5), ["'rope_theta'", "rotary_base"]),
        (lambda: tiny(layers=["softmax"] * 3), ["3 entries for 2 layers"]),
        (lambda: tiny(layers=["softmax", "linformer"], is_causal=True), ["layers[1]", "linformer", "causal-self"]),
        (lambda: tiny(is_encoder_decoder=True, cross_layers="aaren"), ["cross_layers[0]", "aaren", "causal-cross"]),
        (lambda: tiny(is_encoder_decoder=True, decoder_layers=["linformer"]), ["decoder_layers[0]", "causal-self"]),
        (lambda: tiny(pooling="softmax"), ["pooling", "pool"]),
        (lambda: tiny(positions="rotery"), ["rotery", "rotary"]),
        (lambda: tiny(short_conv=-1), ["short_conv=-1"]),
        (lambda: tiny(dropout=1.5), ["dropout=1.5"]),
        (lambda: tiny(image_size=9, patch_size=2), ["image_size=9", "patch_size=2"]),
        (lambda: causal_lm("softmax", "linformer"), ["layers[1]", "linformer", "causal-self"]),
        (lambda: causal_lm("softmax", num_attention_heads=3), ["layers[0]", "heads=3"]),
        (lambda: causal_lm("softmax", is_causal=False), ["is_causal=False"]),
        (lambda: seq2seq("multi-source"), ["cross_layers[0]", "multi-source", "2 sources"]),
        (lambda: image_classifier("softmax", is_causal=False, layers="hilo"), ["layers[0]", "hilo"]),
        (lambda: ManyheadsModel(tiny(is_encoder_decoder=True)), ["ManyheadsSeq2SeqModel"]),
        (lambda: ManyheadsSeq2SeqModel(tiny()), ["is_encoder_decoder=True"]),
        (lambda: causal_lm(short_conv=2)(tokens(1, 3), past_key_values=DynamicCache()), ["DynamicCache", "Cache(2)"]),
        (lambda: causal_lm()(tokens(1, 3), torch.ones(1, 2)), ["attention_mask", "(1, 2)", "[1, 3]"]),
        (lambda: causal_lm()(tokens(1, 3), torch.ones(1, 1, 3, 3)), ["boolean"]),
        (lambda: causal_lm()(), ["exactly one of"]),
        (lambda: causal_lm().generate(tokens(1, 3), max_new_tokens=1, cache_implementation="static"), ["'static'"]),
    ],
)
def test_errors_say_what_to_do(call: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def test_short_convolution_is_centred_where_layers_are_not_causal() -> None:
    model = classifier("softmax", num_hidden_layers=1, short_conv=3)
    convolution = model.model.stack.layers[0].self_attn.convolution
    x = torch.randn(1, 6, 16).double()
    with torch.no_grad():
        wanted = F.conv1d(x.transpose(1, 2), convolution.weight, groups=16, padding=1).transpose(1, 2)
        assert_close(convolution(x, None, None), wanted)
