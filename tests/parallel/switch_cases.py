"""What every process of a group holds of whole models on shards of their sequence, against the same model alone."""

import copy
import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from manyheads.models.auto import ManyheadsForCausalLM
from manyheads.models.configuration import ManyheadsConfig
from manyheads.parallel import Layout, reduce_gradients, ring_attention, sequence_parallel, shard, traffic, wire

SIZES = {"vocab_size": 19, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
# Of a model in float64, whose softmax some layers make in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def ours(*layers, **options):
    torch.manual_seed(0)
    config = ManyheadsConfig(**SIZES, layers=list(layers), num_hidden_layers=len(layers), **options)
    return ManyheadsForCausalLM(config).double()


def hosted(kind: str, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 4}
    sizes |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes | {"eos_token_id": 2} | options)
    ).double()


def batch_of(n: int, *, padded: str = "", packed: bool = False) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(n)
    ids = torch.randint(3, 19, (2, n), generator=drawn)
    labels = ids.clone()
    labels[0, : n // 3] = -100
    batch = {"input_ids": ids, "labels": labels}
    if padded:
        mask = torch.ones(2, n, dtype=torch.long)
        mask[1, slice(0, n // 3) if padded == "left" else slice(n - n // 3, n)] = 0
        batch |= {"attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    if packed:
        first = n // 2
        positions = torch.cat((torch.arange(first), torch.arange(n - first)))[None].repeat(2, 1)
        positions[1] = torch.arange(n)
        begins = positions == 0
        batch |= {"position_ids": positions, "labels": labels.masked_fill(begins, -100)}
    return batch


def equal(model, n: int = 17, *, even: bool = False, softmax: str = "ring", train: bool = True, **kind) -> None:
    """Loss, logits and gradients."""
    batch = batch_of(n, **kind)
    model.train(train)
    alone = copy.deepcopy(model)
    wanted = alone(**batch, use_cache=False)
    wanted.loss.backward()
    with sequence_parallel(model, softmax=softmax) as spread:
        out = model(**spread.shard(batch, even=even))
        loss, logits = spread.total(out.loss), spread.whole(out.logits)[:, :n]
    out.loss.backward()
    spread.reduce_gradients(model)
    after = model(**batch, use_cache=False)
    real = batch.get("attention_mask", torch.ones(2, n)).bool()
    # Only now: a process that stopped at a difference would leave the others waiting for it.
    assert_close(loss, wanted.loss.detach(), **CLOSE)
    assert_close(logits[real], wanted.logits.detach()[real], **CLOSE)
    for (name, mine), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert mine.grad is not None, name
        assert_close(mine.grad, theirs.grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    assert_close(after.logits, wanted.logits)


def under_autocast() -> None:
    """Half precision around float32 weights, in which many hosts' queries and keys are wider than their values."""
    for make in (lambda: hosted("llama"), lambda: ours("softmax", "optimised"), lambda: hosted("gpt_neox")):
        model, batch = make().float().train(), batch_of(17, padded="left")
        exact = model(**batch, use_cache=False)
        exact.loss.backward()
        wanted = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        with sequence_parallel(model) as spread:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(**spread.shard(batch))
            loss = spread.total(out.loss)
        out.loss.backward()
        spread.reduce_gradients(model)
        assert_close(loss, exact.loss.detach(), rtol=0.02, atol=0)
        for mine, own in zip(model.parameters(), wanted, strict=True):
            assert (mine.grad - own).abs().max() < 0.1 * own.abs().max()


def adapted() -> None:
    """Adapters that are trained inside of a model; those that put tokens in front of it are refused."""
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    for make in (lambda: hosted("llama"), lambda: ours("softmax")):
        model, batch = get_peft_model(make(), lora).train(), batch_of(17, padded="left")
        wanted = model(**batch, use_cache=False)
        wanted.loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = [p.grad.clone() for p in trained]
        model.zero_grad()
        with sequence_parallel(model) as spread:
            out = model(**spread.shard(batch))
            loss = spread.total(out.loss)
        out.loss.backward()
        spread.reduce_gradients(model)
        assert_close(loss, wanted.loss.detach(), **CLOSE)
        for parameter, gradient in zip(trained, gradients, strict=True):
            assert_close(parameter.grad.double(), gradient.double(), rtol=1e-4, atol=1e-5)
    for kind, message in ((PromptTuningConfig, "tokens were given"), (PrefixTuningConfig, "past_key_values was given")):
        refused(get_peft_model(hosted("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)), message)


def wrapped() -> None:
    """What others put around a model, and what has taken the mean of gradients itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    batch, size = batch_of(17), dist.get_world_size()
    alone = hosted("llama")
    alone(**batch, use_cache=False).loss.backward()
    mesh = init_device_mesh("cpu", (size,))
    for around in (nn.parallel.DistributedDataParallel, lambda model: fully_shard(model, mesh=mesh)):
        model = hosted("llama")
        outer = around(model)
        with sequence_parallel(outer) as spread:
            (outer(**spread.shard(batch)).loss * size).backward()
        for mine, own in zip(model.parameters(), alone.parameters(), strict=True):
            found = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
            assert_close(found, own.grad, **CLOSE)
    if size > 1:
        with pytest.raises(ValueError, match="parameters of fully_shard were given"):
            spread.reduce_gradients(model)


def shared() -> None:
    """Weights that two lists of parameters share are summed once."""
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    reduce_gradients([parameter, parameter])
    assert parameter.grad.tolist() == [float(dist.get_world_size())] * 2


def begun_again() -> None:
    """A group that has ended is forgotten: the next one may get its address in some processes and not in others, which
    would then wait for what these think is told."""
    known, group = len(wire._known), dist.new_group()
    own = Layout(12, group=group)
    x = own.shard(torch.randn(1, 2, 12, 4), 2)
    ring_attention(x, x, x, own)
    dist.destroy_process_group(group)
    del group, own
    gc.collect()
    assert len(wire._known) == known


def uncounted() -> None:
    """Who hands through a number of labels that is not known gets the count, and not a mean over each part."""
    batch = batch_of(17)
    found = shard({**batch, "num_items_in_batch": None})["num_items_in_batch"]
    assert found.equal(shard(batch)["num_items_in_batch"])


def refused(model, message: str, *, before=lambda model: None, **options) -> None:
    before(model)
    batch = batch_of(17, **options)
    with pytest.raises(ValueError, match=message), sequence_parallel(model) as spread:
        model(**spread.shard(batch))


def listened() -> None:
    """Taps would take one process's keys for all."""
    from manyheads.hosts.taps import tap

    for model in (ours("softmax"), hosted("llama")):
        with (
            sequence_parallel(model) as spread,
            pytest.raises(ValueError, match=r"a listener|manyheads_spread"),
            tap(model, lambda call: None),
        ):
            model(**spread.shard(batch_of(17)))


def too_short() -> None:
    size = dist.get_world_size()
    if size > 1:
        with pytest.raises(ValueError, match=f"{size - 1} tokens were given to {size} processes"):
            shard(batch_of(size - 1))


def elsewhere() -> None:
    """A model that the group cannot send from, and one that lies in two places."""
    away, torn = ours("softmax").to("meta"), ours("softmax")
    torn.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"the model lies on \['cpu', 'meta'\]"), sequence_parallel(torn):
        pass
    if dist.get_world_size() > 1:
        with pytest.raises(ValueError, match="lies on meta, and gloo sends"), sequence_parallel(away):
            pass


def unlike() -> None:
    """Processes with shards of different batches are told so, where they would wait for each other."""
    model, size, rank = ours("softmax"), dist.get_world_size(), dist.get_rank()
    with sequence_parallel(model) as spread:
        mine = spread.shard(batch_of(17 if rank else 19))
        if size > 1:
            with pytest.raises(ValueError, match="want all of one batch"):
                model(**mine)


def counted_apart() -> None:
    """Shares of a loss that are each a mean over a process's own labels are no shares."""
    model, size, rank = ours("softmax"), dist.get_world_size(), dist.get_rank()
    with sequence_parallel(model) as spread:
        mine = spread.shard(batch_of(17)) | {"num_items_in_batch": 5 + rank}
        if size > 1:
            with pytest.raises(ValueError, match=r"num_items_in_batch=\[5, 6"):
                model(**mine)


def two_groups() -> None:
    """A model has one group at a time; another model may have another."""
    own = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    first, second = ours("softmax"), ours("softmax")
    batch = batch_of(11)
    with sequence_parallel(first) as all_of_them, sequence_parallel(second, own) as alone:
        with pytest.raises(ValueError, match="is in another one already"), sequence_parallel(first, own):
            pass
        one = first(**all_of_them.shard(batch))
        other = second(**alone.shard(batch))
        found = all_of_them.whole(one.logits)
    assert_close(found, other.logits.detach(), **CLOSE)


def twice() -> None:
    """Two passes before their backward passes, each with a shard of its own."""
    model = ours("softmax", "lightning")
    alone = copy.deepcopy(model)
    (alone(**batch_of(9)).loss + alone(**batch_of(14)).loss).backward()
    with sequence_parallel(model) as spread:
        losses = [model(**spread.shard(batch_of(n))).loss for n in (9, 14)]
        sum(losses).backward()
        spread.reduce_gradients(model)
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad, **CLOSE)


def halo_bytes() -> None:
    """A window sends its few tokens, whatever the length."""
    found = []
    for n in (24, 48):
        model = ours({"name": "mswa", "window": 4}).float()
        with sequence_parallel(model) as spread, traffic() as count:
            model(**spread.shard(batch_of(n)))
        found.append(count.bytes)
    size, rank = dist.get_world_size(), dist.get_rank()
    told = 6 * 8 * (size - 1)  # what the processes tell each other of a pass
    halo = 7 * 2 * 4 * 8 * 4 if rank < size - 1 else 0
    assert found == [told + halo] * 2


def frozen() -> None:
    """A parameter without a gradient stays without; one that has it in some processes gets the sum in all."""
    from manyheads.parallel import reduce_gradients

    rank, size = dist.get_rank(), dist.get_world_size()
    some, none, still = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
    still.requires_grad_(False)
    if rank == size - 1:
        some.grad = torch.full((3,), 2.0)
    reduce_gradients([some, none, still])
    assert none.grad is None
    assert_close(some.grad, torch.full((3,), 2.0))


def rope(name: str, **options):
    return {"name": name, **options}


CASES = {
    "softmax": lambda: equal(ours("softmax", "gqa")),
    "softmax, left": lambda: equal(ours("softmax", "mqa"), padded="left"),
    "softmax, right, even": lambda: equal(ours("gqa", "softmax"), padded="right", even=True),
    "softmax, packed": lambda: equal(ours("softmax", "softmax"), packed=True),
    "softmax, packed, even": lambda: equal(ours("softmax"), packed=True, even=True),
    "learned places": lambda: equal(ours("softmax", positions="learned", max_position_embeddings=40), padded="left"),
    "optimised, complexformer, coca": lambda: equal(ours("optimised", "complexformer", "coca")),
    "lightning": lambda: equal(ours("lightning", "lightning"), padded="left"),
    "hybrid": lambda: equal(ours("based", "softmax", "lightning"), padded="left"),
    "hedgehog, fastmax, transnormerllm": lambda: equal(ours("hedgehog", "fastmax", "transnormerllm"), padded="right"),
    "flow, aaren": lambda: equal(ours({"name": "flow", "chunk": 4}, {"name": "aaren", "chunk": 4}), padded="left"),
    "aaren": lambda: equal(ours("aaren", "softmax"), packed=True),
    "context-broadcasting": lambda: equal(
        ours("context-broadcasting", {"name": "context-broadcasting", "scaled": True}), padded="right"
    ),
    "lln": lambda: equal(ours("lln", {"name": "lln", "block": 7}), padded="left"),
    "lln, mixed, blocks longer than shards": lambda: equal(
        ours({"name": "lln", "block": 16, "mixing": "scale"}, {"name": "lln", "diagonal": False}), 13
    ),
    "windows": lambda: equal(ours(rope("mswa", window=4), "softmax"), padded="left"),
    "windows longer than shards": lambda: equal(ours(rope("mswa", window=16)), 13),
    "convolutions": lambda: equal(
        ours(rope("lightweight-convolution", kernel_size=5), rope("dynamic-convolution", kernel_size=4)), padded="left"
    ),
    "short convolution": lambda: equal(ours("softmax", "based", short_conv=3), padded="left"),
    "llama": lambda: equal(hosted("llama")),
    "llama, left": lambda: equal(hosted("llama"), padded="left", even=True),
    "llama, packed": lambda: equal(hosted("llama"), packed=True),
    "qwen2": lambda: equal(hosted("qwen2"), padded="right"),
    "qwen3": lambda: equal(hosted("qwen3"), even=True),
    "mistral, window": lambda: equal(hosted("mistral", sliding_window=4), padded="left"),
    "mistral, window, packed": lambda: equal(hosted("mistral", sliding_window=4), packed=True),
    "gemma3": lambda: equal(
        hosted("gemma3_text", sliding_window=4, layer_types=["sliding_attention", "full_attention"]), padded="left"
    ),
    "phi3": lambda: equal(hosted("phi3"), padded="left"),
    "olmo2": lambda: equal(hosted("olmo2", num_key_value_heads=4), packed=True),
    # Its second layer has no rotary embedding.
    "smollm3": lambda: equal(hosted("smollm3", no_rope_layers=[1, 0]), padded="right"),
    "gpt2": lambda: equal(hosted("gpt2", n_embd=16, n_head=4, n_layer=2, n_positions=64)),
    "gpt_neox": lambda: equal(hosted("gpt_neox"), padded="left"),
    "no scheme": lambda: refused(ours("softmax", "titans"), "titans cannot be spread"),
    "no scheme, hosted": lambda: refused(hosted("gemma2"), r"Gemma2ForCausalLM \(gemma2\) is not among"),
    "experts": lambda: refused(ours("softmax", num_local_experts=2), "experts"),
    "checkpointing": lambda: refused(
        ours("softmax"), "checkpoints gradients", before=lambda m: m.train().gradient_checkpointing_enable()
    ),
    "packed states": lambda: refused(ours("lightning"), "several documents in a row", packed=True),
    "hedgehog window": lambda: refused(ours(rope("hedgehog", window=4)), "shares a denominator"),
    "attention dropout": lambda: refused(
        hosted("llama", attention_dropout=0.1), "attention dropout 0.1", before=lambda m: m.train()
    ),
    "listened": listened,
    "too short": too_short,
    "elsewhere": elsewhere,
    "unlike": unlike,
    "counted apart": counted_apart,
    "two groups": two_groups,
    "twice": twice,
    "halo bytes": halo_bytes,
    "frozen": frozen,
    "autocast": under_autocast,
    "uncounted": uncounted,
    "adapted": adapted,
    "wrapped": wrapped,
    "shared": shared,
    "begun again": begun_again,
}


def divides() -> None:
    """By heads, where the processes divide them."""
    if 4 % dist.get_world_size() == 0:
        equal(ours("softmax", "softmax"), softmax="heads", padded="left")
        equal(hosted("llama", num_key_value_heads=4), softmax="heads")


CASES["heads"] = divides
