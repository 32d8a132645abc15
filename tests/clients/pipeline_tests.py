"""Interventions on pipelines of diffusers, tiny ones of random weights: what is neutral, each rule, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import diffusers
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from manyheads.hosts.pipelines import PipelineHost, drawing
from manyheads.hosts.sites import sites
from manyheads.hosts.taps import record
from manyheads.steer.diffusion import (
    borrow_maps,
    box_mask,
    colour_propagation,
    edit_words,
    isolate,
    layers_in,
    layout_guidance,
    merge_concepts,
    multi_reference,
    multi_view,
    perturbed_guidance,
    plug_and_play,
    regional_prompts,
    space_time,
    until,
)
from manyheads.steer.diffusion.word_maps import word_maps

CAPTIONS = ["a cat", "a dog left of a cat", "a bird"]
WORDS = ["<pad>", "<end>", "a", "cat", "dog", "bird", "left", "of"]


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    own = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<end>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", eos_token="<end>", unk_token="<end>", model_max_length=length
    )


def drawn_anew(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


def stable_diffusion() -> Any:
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=6, eos_token_id=1, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=drawn_anew(CLIPTextModel(text)), tokenizer=tokenizer(6), unet=drawn_anew(unet),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def pixart() -> Any:
    torch.manual_seed(1)
    text = T5Config(vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=4, num_attention_heads=2, caption_channels=8,
        cross_attention_dim=8, in_channels=4, out_channels=8,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        vae=vae(), text_encoder=drawn_anew(T5EncoderModel(text)), tokenizer=tokenizer(120),
        transformer=drawn_anew(transformer), scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def vae() -> Any:
    return drawn_anew(
        diffusers.AutoencoderKL(
            block_out_channels=(4, 8),
            norm_num_groups=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    )


PIPES = {"stable_diffusion": stable_diffusion(), "pixart": pixart()}
OPTIONS: dict[str, dict[str, Any]] = {
    "stable_diffusion": {"output_type": "latent"},
    "pixart": {"output_type": "latent", "use_resolution_binning": False, "clean_caption": False},
}
for pipe in PIPES.values():
    pipe.set_progress_bar_config(disable=True)
MODELS = {name: drawing(pipe) for name, pipe in PIPES.items()}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def sample(name: str, captions: list[str] = CAPTIONS, steps: int = 3, guidance: float = 4.0) -> Tensor:
    return MODELS[name].sample(captions, steps=steps, guidance=guidance, **OPTIONS[name]).images


def plain(name: str, captions: list[str] = CAPTIONS) -> Tensor:
    """The pipeline's own call, with its own processors."""
    return PIPES[name](
        prompt=captions, num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(0),
        **OPTIONS[name],
    ).images  # fmt: skip


def halves(model: PipelineHost) -> Tensor:
    return torch.stack([box_mask(model, (0, 0, 16, 8)), box_mask(model, (0, 8, 16, 16))])


Opened = Callable[[PipelineHost], AbstractContextManager[Any]]
NEUTRAL: dict[str, Opened] = {
    "plug_and_play": lambda m: plug_and_play(m, 0, active=until(0, 3)),
    "isolate": lambda m: isolate(m, halves(m)[:1]),
    "regional": lambda m: regional_prompts(m, ["a cat", "a dog"], halves(m), weight=0),
    "space_time": lambda m: space_time(m, ["a cat"], [(0.5, 0.5)], 0),
    "edit_words": lambda m: edit_words(m, [2]),
    "borrow_maps": lambda m: borrow_maps(m, 0, words=[2], active=until(0, 3)),
    "multi_reference": lambda m: multi_reference(m, 0, {}),
    "multi_view": lambda m: multi_view(m, [0, 1], scale=0),
    "merge": lambda m: merge_concepts(m, 0, {}),
    "colour": lambda m: colour_propagation(m, [1]),
}
CHANGED: dict[str, Opened] = {
    "plug_and_play": lambda m: plug_and_play(m, 0, active=until(0.7, 3)),
    "isolate": lambda m: isolate(m, halves(m)),
    "regional": lambda m: regional_prompts(m, ["a cat", "a dog"], halves(m)),
    "space_time": lambda m: space_time(m, ["a bird"], [(0.5, 0.5)], 0.5),
    "edit_words": lambda m: edit_words(m, [1], times=0),
    "borrow_maps": lambda m: borrow_maps(m, 0, words=[1]),
    "multi_reference": lambda m: multi_reference(m, 0, {1: halves(m)[0]}),
    "multi_view": lambda m: multi_view(m, [0, 1]),
    "merge": lambda m: merge_concepts(m, 0, {1: halves(m)[0]}),
    "colour": lambda m: colour_propagation(m, [0, 1]),
}


@pytest.mark.parametrize("change", NEUTRAL)
def test_neutral_settings_give_the_pipelines_own_pictures_bit_for_bit(name: str, change: str) -> None:
    before = plain(name)
    with NEUTRAL[change](MODELS[name]):
        assert torch.equal(sample(name), before)


@pytest.mark.parametrize("change", CHANGED)
def test_other_settings_change_them_and_an_error_inside_leaves_nothing_changed(name: str, change: str) -> None:
    before, model = plain(name), MODELS[name]
    processors = [id(site.module.processor) for site in sites(model)]
    with CHANGED[change](model):
        assert (sample(name) - before).abs().max() > 1e-5
        assert [id(site.module.processor) for site in sites(model)] != processors
    broken = model.denoiser.register_forward_pre_hook(stop)
    with pytest.raises(KeyError), CHANGED[change](model):
        sample(name)
    broken.remove()
    assert [id(site.module.processor) for site in sites(model)] == processors
    assert not model.denoiser._forward_pre_hooks
    assert not model.denoiser._forward_hooks
    assert torch.equal(plain(name), before)


def stop(module: Any, args: Any) -> None:
    raise KeyError


def test_layers_are_counted_as_they_run() -> None:
    model = MODELS["stable_diffusion"]
    paths = [site.path for site in sites(model) if site.kind == "self"]
    with torch.no_grad(), record(model, kind="self") as calls:
        model(model.noise(1, 0), torch.ones(1), *model.encode(["a cat"]))
    assert [call.site.path for call in calls] == paths
    assert layers_in(model, "up") == list(range(len(layers_in(model, "down")) + 1, len(paths)))
    assert layers_in(model, "mid") == [len(layers_in(model, "down"))]
    with pytest.raises(ValueError, match="down_blocks, mid_block, up_blocks"):
        layers_in(model, "sideways")


def test_isolation_hides_the_other_subject_in_every_layer(name: str) -> None:
    model, sizes = MODELS[name], set()
    seen: list[Any] = []
    with isolate(model, halves(model)), record(model, kind="self") as calls:
        sample(name, steps=2)
        seen += calls
    for call in seen:
        side = math.isqrt(call.query.shape[2])
        of = (torch.arange(side) >= side // 2).repeat(side)
        for row in (0, len(call.query) - 1):
            for i in range(0, side * side, 5):
                scores = [
                    float(call.query[row, 1, i] @ call.key[row, 1, j]) * call.scale if of[i] == of[j] else -math.inf
                    for j in range(side * side)
                ]
                shares = torch.tensor(scores).softmax(0)
                assert_close(call.output[row, 1, i], shares @ call.value[row, 1], atol=1e-5, rtol=1e-4)
        sizes.add(side)
    assert sizes == ({4, 8} if name == "stable_diffusion" else {4})


def test_regions_read_their_own_captions_and_no_padding(name: str) -> None:
    model = MODELS[name]
    with (
        torch.no_grad(),
        record(model, kind="cross", layers=[0]) as before,
        regional_prompts(model, ["a dog", "a bird"], halves(model)),
        record(model, kind="cross", layers=[0]) as after,
    ):
        sample(name, steps=2)
    call, changed, layer = before[-1], after[-1], before[-1].site.module
    side = math.isqrt(call.query.shape[2])
    for number, caption in enumerate(("a dog", "a bird")):
        words, mask = model.encode([caption])
        if name == "pixart":
            words = model.denoiser.caption_projection(words)
        key, value = (own(words)[0].unflatten(-1, (2, -1)).transpose(0, 1).detach() for own in (layer.to_k, layer.to_v))
        for i in range(side * side):
            if (i % side >= side // 2) != bool(number):
                continue
            scores = torch.stack([call.query[4, 0, i] @ key[0, j] for j in range(key.shape[1])]) * call.scale
            shares = scores.masked_fill(~mask[0], -math.inf).softmax(0)
            assert_close(changed.output[4, 0, i], shares @ value[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(changed.output[:3], call.output[:3])
    if name == "pixart":
        assert int(mask.sum()) < mask.shape[1]


def test_a_named_word_that_is_padding_stays_unseen() -> None:
    model = MODELS["pixart"]
    before = sample("pixart")
    with edit_words(model, [100], add=0.5):
        assert_close(
            sample("pixart"), before, atol=1e-2, rtol=1e-3
        )  # a product of its own in the place of the kernel's


def test_word_maps_are_of_one_size(name: str) -> None:
    model = MODELS[name]
    words, mask = model.encode(CAPTIONS)
    maps = word_maps(model, model.noise(3, 0), 0.5, words, mask, side=4)
    assert maps.shape == (3, 16, words.shape[1])
    assert_close(maps.sum(-1), torch.ones(3, 16))


def test_steps_are_told_by_the_schedulers_own_times(name: str) -> None:
    model, seen = MODELS[name], []
    handle = model.denoiser.register_forward_hook(lambda *given: seen.append(model._told))
    for guidance in (4.0, 1.0):
        hook = sites(model)[0].module.register_forward_hook(lambda *given: seen.append(model.step))
        sample(name, steps=3, guidance=guidance)
        hook.remove()
    handle.remove()
    told = [step for step in seen if step is not None]
    assert [step.index for step in told[::2][:3]] == [0, 1, 2] or [step.index for step in told[:3]] == [0, 1, 2]
    assert {(step.captions, step.count) for step in told} == {(3, 3)}
    assert {step.guided for step in told} == {True, False}
    with pytest.raises(ValueError, match="no step is told"):
        model.step  # noqa: B018


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m: perturbed_guidance(m, None).__enter__(), "perturbed_guidance corrects"),
        (lambda m: layout_guidance(m, torch.zeros(2, 1, 4, 8, 8)).__enter__(), "layout_guidance moves"),
        (lambda m: m.sample([]), "no captions"),
        (lambda m: m.sample(["a cat"], height=32), r"\['height'\]"),
        (lambda m: m.sample(["a cat"], num_images_per_prompt=2), "num_images_per_prompt"),
        (lambda m: box_mask(m, (0, 0, 17, 8)), "16 x 16 pixels"),
        (lambda m: drawing(object()), "denoises by NoneType"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(name: str, run: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(MODELS[name])


def test_a_pipeline_run_by_itself_inside_of_an_intervention_is_refused(name: str) -> None:
    model = MODELS[name]
    with edit_words(model, [1], times=0), pytest.raises(ValueError, match="run the pipeline by sample"):
        plain(name)


def test_a_processor_that_is_not_the_default_one_is_refused() -> None:
    pipe = stable_diffusion()
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    model = drawing(pipe)
    with pytest.raises(ValueError, match="attends by AttnProcessor, which"), isolate(model, halves(model)):
        pass
