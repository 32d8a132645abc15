"""Programs that know transformers and not manyheads, over the four models. Run by run.py.

The sdist of transformers has no tests of generate, so that the checks of generation stand here: what it does with the
mechanisms' states against what it does without, where every step is computed anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

from manyheads.models.borrowed import obstacle
from manyheads.models.byte_tokenizer import byte_tokenizer

HERE = Path(__file__).parent
KINDS = os.environ["CLIENTS_KINDS"].split(",")
each_kind = pytest.mark.parametrize("kind", KINDS)


def built(model: str, kind: str, **settings: Any) -> Any:
    """In float64, and loud enough that tokens differ."""
    torch.manual_seed(0)
    config = models.config(model, kind, initializer_range=1.0, tie_word_embeddings=False, **settings)
    return models.MODELS[model][0](config).double().eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(3, models.VOCAB, shape, generator=torch.Generator().manual_seed(0))


# -- generate --------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "beam": {"num_beams": 3},
    "beam-sample": {"num_beams": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "scores": {"output_scores": True, "output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "prompt-lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("model", ["causal-lm", "seq2seq-lm"])
@pytest.mark.parametrize("how", OPTIONS)
@each_kind
def test_generate(kind: str, how: str, model: str) -> None:
    if how == "prompt-lookup" and model == "seq2seq-lm":
        pytest.skip("the prompt is the encoder's: there is none to look up in")
    lm, prompt = built(model, kind), ids(1 if how == "prompt-lookup" else 2, 6)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, **OPTIONS[how]}
        if how == "prompt-lookup" and not use_cache:
            options.pop("prompt_lookup_num_tokens")
        found.append(lm.generate(prompt, use_cache=use_cache, **options))
    assert found[0].sequences.tolist() == found[1].sequences.tolist()
    if how == "scores":
        assert_close(found[0].scores, found[1].scores)


@each_kind
def test_generate_from_padded_rows_embeddings_and_a_second_turn(kind: str) -> None:
    lm, prompt = built("causal-lm", kind), ids(2, 7)
    options = {"max_new_tokens": 4, "do_sample": False}
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    padded = lm.generate(prompt.masked_fill(mask == 0, 0), attention_mask=mask, **options)
    alone = lm.generate(prompt[1:, 3:], **options)
    assert padded[1, 7:][: alone.shape[1] - 4].tolist() == alone[0, 4:].tolist()
    embedded = lm.generate(inputs_embeds=lm.get_input_embeddings()(prompt[:1]), **options)
    first = lm.generate(prompt[:1], return_dict_in_generate=True, **options)
    assert embedded.tolist() == first.sequences[:, 7:].tolist()
    turn = torch.cat([first.sequences, prompt[1:, :3]], 1)
    second = lm.generate(turn, past_key_values=first.past_key_values, **options)
    assert second.tolist() == lm.generate(turn, use_cache=False, **options).tolist()


@each_kind
def test_generate_assisted(kind: str) -> None:
    lm, small, prompt = built("causal-lm", kind), built("causal-lm", kind, num_hidden_layers=1), ids(1, 6)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert lm.generate(prompt, assistant_model=small, **options).tolist() == lm.generate(prompt, **options).tolist()


# -- PEFT ------------------------------------------------------------------------------------------------------------

TASKS = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM", "text-classifier": "SEQ_CLS", "image-classifier": None}


@pytest.mark.parametrize("model", models.MODELS)
@each_kind
def test_lora_trains_every_projection_and_merges(kind: str, model: str) -> None:
    from peft import LoraConfig, get_peft_model

    if not models.applies(model, kind):
        pytest.skip(f"{kind} is causal only")
    base, inputs = built(model, kind), models.inputs(model)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    rank = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, "task_type": TASKS[model]}
    adapted = get_peft_model(base, LoraConfig(**rank)).double().eval()
    adapted(**inputs).logits.square().sum().backward()
    idle = [n for n, p in adapted.named_parameters() if "lora_" in n and (p.grad is None or not bool(p.grad.any()))]
    assert not idle, f"no gradient reaches {idle}"
    with torch.no_grad():
        wanted = adapted(**inputs).logits
        assert_close(adapted.merge_and_unload()(**inputs).logits, wanted, rtol=1e-6, atol=1e-6)


@each_kind
def test_prefix_tuning(kind: str) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    base = built("causal-lm", kind)
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    why = obstacle(DynamicCache(), base.model.stack)
    if why:
        with pytest.raises(ValueError, match="past_key_values"):
            model(input_ids=ids(2, 5), attention_mask=torch.ones(2, 5))
        pytest.skip(f"a prefix is keys and values, and {why}")
    model(input_ids=ids(2, 5), attention_mask=torch.ones(2, 5), labels=ids(2, 5)).loss.backward()
    assert bool(model.prompt_encoder["default"].embedding.weight.grad.any())


# -- accelerate, captum, lm-evaluation-harness -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:1])
def test_accelerate_on_two_processes(kind: str, tmp_path: Path) -> None:
    """Gradients over two processes are those of one over the whole batch."""
    out = tmp_path / "loss.json"
    # accelerate's own launcher starts several processes without accelerators through MPI alone.
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([*command, str(HERE / "two_processes.py"), str(out), kind])
    assert json.loads(out.read_text())["worst"] < 1e-9


@each_kind
def test_captum_attributions_add_up(kind: str) -> None:
    """Integrated gradients of the token embeddings sum to what the class gains over the baseline."""
    from captum.attr import LayerIntegratedGradients

    model, text = built("text-classifier", kind), ids(1, 6)
    # Not the padding, whose row is zero as in transformers: there a norm jumps, and integrated gradients miss jumps.
    base = torch.ones_like(text)
    method = LayerIntegratedGradients(lambda t: model(t).logits, model.get_input_embeddings())
    found, error = method.attribute(text, base, target=1, n_steps=64, return_convergence_delta=True)
    assert found.shape == (1, 6, model.config.hidden_size)
    gained = (model(text).logits - model(base).logits)[0, 1]
    assert abs(float(error)) < 0.05 * max(1.0, abs(float(gained)))


TASK = """
task: made_up
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


@each_kind
def test_lm_evaluation_harness_on_a_made_up_task(kind: str, tmp_path: Path) -> None:
    """Likelihoods by hand, and its own: for the first kind through its command line, which imports nothing of ours."""
    torch.manual_seed(0)
    lm = models.MODELS["causal-lm"][0](models.config("causal-lm", kind, vocab_size=256, initializer_range=1.0)).eval()
    lm.save_pretrained(tmp_path / "model")
    byte_tokenizer(2048).save_pretrained(tmp_path / "model")
    docs = [{"question": f"{i} and {i + 1} make", "choices": [f" {2 * i + 1}", f" {2 * i + 2}"]} for i in range(6)]
    file = tmp_path / "docs.json"
    file.write_text("\n".join(json.dumps(doc) for doc in docs))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "made_up.yaml").write_text(TASK.format(file=file))
    arguments = f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32,prefix_token_id=10"
    results = by_command(arguments, tmp_path) if kind == KINDS[0] else by_call(arguments, tmp_path)
    right = sum(likelihood(lm, doc, 0) > likelihood(lm, doc, 1) for doc in docs)
    assert results["results"]["made_up"]["acc,none"] == pytest.approx(right / len(docs))


def by_command(arguments: str, folder: Path) -> dict[str, Any]:
    command = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--tasks", "made_up"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "out")]
    run([*command, "--device", "cpu", "--batch_size", "2", "--trust_remote_code"])
    return json.loads(next((folder / "out").rglob("results*.json")).read_text())


def by_call(arguments: str, folder: Path) -> dict[str, Any]:
    """Without the half minute in which its command line starts and lists its thousands of tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf", model_args=arguments, tasks=["made_up"], device="cpu", batch_size=2,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
    )  # fmt: skip
    assert found is not None
    return found


def likelihood(lm: Any, doc: dict[str, Any], choice: int) -> float:
    asked, told = (list(text.encode()) for text in (doc["question"], doc["choices"][choice]))
    with torch.no_grad():
        logits = lm(torch.tensor([asked + told])).logits[0, len(asked) - 1 : -1].log_softmax(-1)
    return float(logits[torch.arange(len(told)), told].sum())


def run(arguments: list[str]) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline}, timeout=900)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
