"""Ways to train as people use them: under autocast, with running averages of a model, one wrapper inside another, in
batches of uneven rows, and from a checkpoint on."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads import create_attention
from manyheads.functional.linear import Kernel, causal_read, matrix_read, recall, summarise
from manyheads.training import (
    BranchLabels,
    BucketBatches,
    EntropyMaximised,
    HardInstanceMining,
    HeadMask,
    LocallySubsampled,
    SubsampledAttention,
    TokenAwarePooling,
    VisualFactors,
    anchored_contrast,
    attention_diversification,
    image_numbers,
    length_buckets,
    locally_subsampled,
    minilm_loss,
)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_losses_are_made_in_float32_under_autocast(kind):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 9, 8)
    image, text = torch.randn(2, 6, 8)

    def losses():
        return minilm_loss(student, teacher, heads=2), anchored_contrast(text, [image], temperature=0.02)

    wanted = losses()
    with torch.autocast("cpu", kind):
        found = losses()
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == torch.float32
        assert_close(own, other, rtol=0, atol=0)


def test_sums_over_the_past_are_made_in_float32_under_autocast():
    """In float16 a sum that is larger than 65,504 is none."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 4)
    kernel = Kernel(features=lambda x: 1e4 * x.exp())

    def read():
        kept = causal_read(q, k, v, kernel, chunk=8, keep=True)
        memory = summarise(k, v, kernel, chunk=8)
        return kept.mixed, kept.memory, memory, recall(q, memory, kernel), *matrix_read(q, k, v, kernel, causal=True)

    wanted = read()
    with torch.autocast("cpu", torch.float16):
        found = read()
    for own, other in zip(found, wanted, strict=True):
        assert_close(own, other, rtol=0, atol=0)


def test_a_long_text_under_float16_autocast():
    torch.manual_seed(0)
    attention, x = create_attention("lln", 16, 2, causal=True).eval(), 4 * torch.randn(1, 150, 16) + 2
    with torch.no_grad():
        wanted = attention(x).output
        with torch.autocast("cpu", torch.float16):
            found = attention(x).output
    assert found.isfinite().all()
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_a_batch_of_uneven_rows_has_the_entropy_of_the_rows():
    torch.manual_seed(0)
    module = EntropyMaximised(create_attention("softmax", 8, 2)).double().train()
    rows = torch.randn(2, 6, 8).double()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 2:] = False
    alone = [module(row[real][None]).losses["attention_entropy"] for row, real in zip(rows, mask, strict=True)]
    wanted = (6 * alone[0] + 2 * alone[1]) / 8
    assert_close(module(rows, mask=mask).losses["attention_entropy"], wanted)


def test_a_copy_of_a_model_that_lacks_heads_has_a_mode_of_its_own_and_its_heads_afterwards():
    layers, x = nn.ModuleList([create_attention("softmax", 8, 2)]).train(), torch.randn(1, 3, 8)
    with HeadMask(layers, count=1) as heads:
        heads.draw()
        average = copy.deepcopy(layers)
        assert not torch.equal(layers[0](x).output, average.eval()[0](x).output)
        assert_close(average[0](x).output, copy.deepcopy(layers).eval()[0](x).output, rtol=0, atol=0)
    assert_close(average.train()[0](x).output, layers[0](x).output, rtol=0, atol=0)


def test_a_running_average_whose_steps_are_lost_is_refused():
    miner = HardInstanceMining(create_attention("acmil", 8, 2), momentum=0.9999).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16, momentum=0\.9999, whose steps are lost in rounding"):
        miner.update()
    miner.momentum = 1.0  # where the released recipes end
    miner.update()


@pytest.mark.parametrize(
    "wrap",
    [
        SubsampledAttention,
        LocallySubsampled,
        TokenAwarePooling,
        HardInstanceMining,
        lambda given: BranchLabels(given, classes=2),
        lambda given: EntropyMaximised(given.mechanism if isinstance(given, EntropyMaximised) else given),
    ],
)
def test_what_is_no_mechanism_is_refused_when_it_is_given(wrap):
    inner = EntropyMaximised(create_attention("acmil", 8, 2))
    inner.mechanism = nn.MultiheadAttention(8, 2)
    for given in (nn.MultiheadAttention(8, 2), "softmax", inner):
        with pytest.raises(ValueError, match="want a mechanism as create_attention makes it"):
            wrap(given)


def test_heads_that_an_adapter_reads_are_masked_before_it():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.ModuleDict({"only": create_attention("softmax", 8, 2)})
    adapted = get_peft_model(model, LoraConfig(target_modules=["o_proj"], init_lora_weights=False)).train()
    x, joined = torch.randn(1, 3, 8), []
    projection = adapted.base_model.model["only"].o_proj
    for part in (projection.base_layer, projection.lora_A["default"]):
        part.register_forward_pre_hook(lambda module, args: joined.append(args[0]))
    with HeadMask(adapted, count=1) as heads:
        heads.kept = torch.tensor([False, True])
        adapted.base_model.model["only"](x)
    assert len(joined) == 2
    for given in joined:
        assert not given[..., :4].any()
        assert given[..., 4:].all()


def test_layers_that_are_named_twice_and_prompts_without_tokens():
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    factors = VisualFactors(model, images=1, layers=(1, 1))
    ids = torch.tensor([[3, 4, 4, 5, 6]])
    with factors.on(model, image_numbers(ids, 4)):
        model(input_ids=ids, labels=ids).loss.backward()
    assert factors.factors.grad.shape == (1, 2, 1)
    with pytest.raises(ValueError, match=r"which is \(0, 5\)"), factors.on(model, torch.zeros(0, 5).long()):
        pass


def test_heads_of_a_model_without_mechanisms_cannot_be_masked():
    with pytest.raises(ValueError, match="Linear has no mechanism"):
        HeadMask(nn.Linear(2, 2), count=0)


def test_the_entropy_of_a_wrapped_mechanism():
    wrapped = EntropyMaximised(SubsampledAttention(create_attention("softmax", 8, 2)))
    assert set(wrapped.train()(torch.randn(1, 5, 8)).losses) == {"attention_entropy"}


def test_bags_without_a_label_are_in_no_loss_of_labels():
    torch.manual_seed(0)
    module, x = BranchLabels(create_attention("acmil", 8, 2), classes=2).eval(), torch.randn(3, 4, 8)
    some = module(x, torch.tensor([0, -100, 1], dtype=torch.int32)).losses
    others = module(x[[0, 2]], torch.tensor([0, 1])).losses
    for name in ("branches", "bag"):
        assert_close(some[name], others[name])


def test_tokens_are_counted_in_half_precision():
    """bfloat16 has no number between 256 and 258."""
    torch.manual_seed(0)
    rows, real = torch.randn(1, 2, 300, 300).softmax(-1).bfloat16(), torch.arange(300)[None] < 257
    found = attention_diversification(rows, threshold=0.5, queries=real)
    assert found.dtype == torch.float32
    assert_close(found, attention_diversification(rows.float(), threshold=0.5, queries=real), rtol=1e-4, atol=0)


def test_agreement_with_a_teacher_is_measured_in_float32_under_autocast():
    miner = HardInstanceMining(create_attention("acmil", 8, 2), high=0.0).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert miner(torch.randn(1, 4, 8)).losses["consistency"].dtype == torch.float32


def test_no_kinds_of_vectors_teach_nothing():
    with pytest.raises(ValueError, match="0 kinds of vectors"):
        minilm_loss([], [], heads=1)


def test_a_checkpoint_that_is_saved_meanwhile_is_the_models_own(tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).train()
    ids = torch.arange(12)[None]
    with locally_subsampled(model, keep=0.25, spread=0.0):
        model.save_pretrained(tmp_path)
        average = copy.deepcopy(model).eval()
        drawn = model(input_ids=ids).logits
    assert_close(average(input_ids=ids).logits, model(input_ids=ids).logits)
    again = LlamaForCausalLM.from_pretrained(tmp_path).train()
    assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
    with locally_subsampled(again, keep=0.25, spread=0.0):
        assert_close(again(input_ids=ids).logits, drawn)
    with pytest.raises(ValueError, match="trains outside of the locally_subsampled"):
        average.train()(input_ids=ids)


def test_an_epoch_that_is_resumed_goes_on_with_its_own_batches():
    """As Trainer and accelerate do it: a new process skips what was done, and says which epoch it is in."""
    from accelerate import skip_first_batches
    from accelerate.data_loader import prepare_data_loader

    pairs = [(20 + 7 * i % 40, 1 + 5 * i % 6) for i in range(40)]

    def loader():
        batches = BucketBatches(pairs, dict.fromkeys(length_buckets(pairs, 3), 4))
        return prepare_data_loader(DataLoader(list(range(40)), batch_sampler=batches), put_on_device=False)

    whole = loader()
    epochs = [[batch.tolist() for batch in whole] for _ in range(3)]
    rest = skip_first_batches(loader(), 4)
    rest.set_epoch(2)
    rest.batch_sampler.batch_sampler.set_epoch(2)  # Trainer reaches through what wraps a sampler
    assert [batch.tolist() for batch in rest] == epochs[2][4:]
    again = loader()
    again.set_epoch(1)
    assert [batch.tolist() for batch in again] == epochs[1]
    assert [batch.tolist() for batch in again] == epochs[2]
