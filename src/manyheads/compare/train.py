"""One trainer for every mechanism: the same model around it, the same batches, the same budget."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.cache_names import cache_of
from manyheads.card import Pattern
from manyheads.compare.hybrid import common_patterns, deepened, specs_of
from manyheads.compare.measure import live_bytes
from manyheads.compare.passes import Alone, Passes, inputs_of, passes_of
from manyheads.registry import mechanism_class
from manyheads.tasks import Batch, Task, create_task, list_tasks, task_class

Specs = Mapping[str, Any] | Sequence[Mapping[str, Any]]
_EVAL_BATCH = 128
_PROBED, _NOTHING = 8, 1e-12  # examples; a gradient whose square float32 holds as 0 is none
_SHAPED = (Pattern.GRID, Pattern.GRAPH)  # noncausal mechanisms see these as a sequence, or a set


def train_cell(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Trains and evaluates one quality cell. The settings are those of `Cell`; the outcome is its measured columns."""
    task = create_task(settings["task"]["name"], **settings["task"]["args"])
    torch.manual_seed(settings["seed"])
    model = build_model(task, specs_of(settings["mechanism"]), settings["model"])
    training = settings["training"]
    accelerator = _accelerator(settings["device"], settings["precision"])
    optimizer = torch.optim.AdamW(
        _decayed(model, training["weight_decay"]), lr=settings["learning_rate"], betas=(0.9, 0.98)
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, training))
    outcome = {
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "device": accelerator.device.type,
    }
    batches = task.train_batches(training["batch_size"], settings["seed"])
    with passes_of(accelerator, model, training["router_weight"]) as passes:
        run = _Run(task, model, optimizer, scheduler, accelerator, training, passes)
        outcome |= _train(run, batches)
        if outcome["status"] != "done":
            return outcome
        if training.get("beyond"):
            outcome["beyond"] = [beyond(run, times) for times in training["beyond"]]
    held = state_bytes(task, accelerator.unwrap_model(model), accelerator.device)
    return outcome if held is None else outcome | {"model_state_bytes": held}


class _Run(NamedTuple):
    task: Task
    model: Any
    optimizer: Any
    scheduler: Any
    accelerator: Any
    training: Mapping[str, Any]
    passes: Passes


def _train(run: _Run, batches: Iterator[Batch]) -> dict[str, Any]:
    task, training = run.task, run.training
    curve: list[dict[str, Any]] = []
    outcome: dict[str, Any] = {"status": "done", "curve": curve, "stopped": "at the last step"}
    losses: list[Tensor] = []
    spent, began = 0.0, time.perf_counter()
    for step, batch in enumerate(islice(batches, training["steps"]), start=1):
        losses.append(_step(run, batch))
        spent += time.perf_counter() - began
        in_time = training["seconds"] is None or run.passes.agreed(spent < training["seconds"])
        if step == 1 or step % training["eval_every"] == 0 or step == training["steps"] or not in_time:
            score, loss = evaluate(task, run.model, run.passes.device, run.passes), float(torch.stack(losses).mean())
            value = score.value
            losses.clear()
            curve.append({"step": step, "loss": loss, "value": value})
            outcome |= {"value": value, "value_error": score.error, "answers": score.answers}
            outcome |= {"steps": step, "train_seconds": spent}
            if not (math.isfinite(loss) and math.isfinite(value)):
                words = f"training diverged: at step {step} the loss is {loss} and {task.metric} is {value}"
                return outcome | {"status": "failed", "error": f"{words}; a smaller learning rate may help"}
            if task.metric == "accuracy" and training["stop_at"] is not None and value >= training["stop_at"]:
                return outcome | {"stopped": f"accuracy passed {training['stop_at']}"}
        if not in_time:
            return outcome | {"stopped": f"after {training['seconds']} seconds"}
        began = time.perf_counter()
    return outcome


def _step(run: _Run, batch: Batch) -> Tensor:
    run.model.train()
    loss, total = run.passes.learn(run.task, run.model, batch)
    run.accelerator.backward(total)
    run.accelerator.clip_grad_norm_(run.model.parameters(), run.training["clip"])
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def beyond(run: _Run, times: int) -> dict[str, Any]:
    """The trained model's score on examples `times` as long, or why it has none."""
    task = run.task.longer(times)
    place = {"times": times, "n": task.n}
    try:
        if untrained := _untrained(run, task):
            words = f"{untrained} numbers that no step of training changed are read at n {task.n}"
            return place | {"value": None, "error": f"{words}: what it learnt ends at n {run.task.n}"}
        score = evaluate(task, run.model, run.passes.device, run.passes)
    except ValueError as error:  # the mechanism's own limit
        return place | {"value": None, "error": str(error)}
    if not math.isfinite(score.value):
        return place | {"value": None, "error": f"{task.metric} is {score.value}"}
    return place | {"value": score.value, "value_error": score.error, "answers": score.answers, "error": None}


def _untrained(run: _Run, task: Task) -> str:
    """Of the first parameter, tokens' embeddings aside, that has numbers which the task reads and no step changed, its
    name and how many; '' where there is none. Tables by position or distance are as they were drawn beyond what was
    trained, and an accuracy would be of those."""
    model = run.accelerator.unwrap_model(run.model)
    model.eval()
    _, total = run.passes.learn(task, run.model, next(iter(task.eval_batches(_PROBED))))
    run.accelerator.backward(total)
    words = [embed.weight for embed in (model.get_input_embeddings(), model.get_output_embeddings()) if embed]
    found = ""
    for name, parameter in model.named_parameters():
        if parameter.grad is None or any(parameter is word for word in words):
            continue
        changed = run.optimizer.state.get(parameter, {}).get("exp_avg_sq")
        read = parameter.grad.abs() > _NOTHING
        read = read if changed is None else read & (changed == 0)
        found = found or (f"{name}: {int(read.sum())}" if read.any() else "")
    run.optimizer.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def state_bytes(task: Task, model: Any, device: torch.device) -> int | None:
    """Bytes that the mechanisms of all layers remember of the task's first example, for the next token; None where the
    model does not decode."""
    if task.head != "causal-lm" or task.pattern != Pattern.CAUSAL_SELF or not model.decoder_stack.can_cache:
        return None
    model.eval()
    output = model(**inputs_of(task, model, next(iter(task.eval_batches(1))), device), use_cache=True)
    layers = cache_of(output).layers
    return sum(live_bytes(layer.self_attention.states["mechanism"]) for layer in layers)


class Score(NamedTuple):
    """A task's metric over its evaluation examples, its standard error as a sample of what the task could have asked
    (None where one example tells nothing of it), and how many answers it is of."""

    value: float
    error: float | None
    answers: int


@torch.no_grad()
def evaluate(task: Task, model: Any, device: torch.device, passes: Passes | None = None) -> Score:
    """The task's metric over all of its evaluation examples. passes: by this process alone without them."""
    passes = Alone(device) if passes is None else passes
    model.eval()
    examples: list[tuple[float, int]] = []
    for batch in task.eval_batches(_EVAL_BATCH):
        logits = task.aligned(passes.answers(task, model, batch)).float()
        targets = batch.targets.to(device)
        examples += [task.score(logits[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]
    total, count = sum(value for value, _ in examples), sum(asked for _, asked in examples)
    value = total / count
    return Score(value, error_of(task.metric, examples), count)


def error_of(metric: str, examples: Sequence[tuple[float, int]]) -> float | None:
    """Standard error of the sum over the count of (sum, count) per example.

    An accuracy has the binomial error of its answers, with two right and two wrong ones more (Agresti and Coull), so
    that all right is not taken for certain. Anything else has that of a ratio, examples being independent.
    """
    total, count, m = sum(value for value, _ in examples), sum(asked for _, asked in examples), len(examples)
    if metric == "accuracy":
        share = (total + 2) / (count + 4)
        return math.sqrt(share * (1 - share) / (count + 4))
    if m < 2:
        return None
    rest = sum((value - total / count * asked) ** 2 for value, asked in examples)
    return math.sqrt(rest * m / (m - 1)) / count


def rate_at(step: int, training: Mapping[str, Any]) -> float:
    """The factor on the learning rate: a linear warm-up, then constant, or half a cosine down to a tenth."""
    steps = training["steps"]
    warm = round(training["warmup"] * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if training["schedule"] == "constant":
        return 1.0
    part = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, part))) / 2


def build_model(task: Task, spec: Specs, size: Mapping[str, Any]) -> Any:
    """The task's model with the mechanism where the task needs it, and softmax everywhere else. Several specs: those
    of the layers, again from the first where the model has more.

    In an encoder-decoder the mechanism is what the decoder reads the encoder with; in a detector, unless it attends
    over images, what the queries read the image with; where it pools, it is the classifier's pooling.
    """
    from manyheads import models

    settings = task.model_settings()
    by_kind = list(size.get("by_kind", ()))  # older settings have none of these
    if not by_kind:
        settings.pop("num_token_kinds", None)
    if "max_length" in settings:
        settings["max_position_embeddings"] = settings.pop("max_length")
    settings |= {
        "hidden_size": size["hidden_size"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "intermediate_size": size["intermediate_size"],
        "short_conv": size["short_conv"],
        "positions": size["positions"],
        "by_kind": by_kind,
        "adapter_size": size.get("adapter_size", 0),
        "is_encoder_decoder": task.head == "seq2seq-lm",
        "use_cache": False,
    }
    cls: Any = {
        "causal-lm": models.ManyheadsForCausalLM,
        "seq2seq-lm": models.ManyheadsForSeq2SeqLM,
        "sequence-classification": models.ManyheadsForSequenceClassification,
        "token-classification": models.ManyheadsForTokenClassification,
        "image-classification": models.ManyheadsForImageClassification,
        "semantic-segmentation": models.ManyheadsForSemanticSegmentation,
        "object-detection": models.ManyheadsForObjectDetection,
        "node-classification": models.ManyheadsForNodeClassification,
    }[task.head]
    where = placed(task, spec, size["layers"])
    for key in ("layers", "cross_layers"):
        if len(where.get(key, ())) > 1:
            where[key] = deepened(where[key], size["layers"])
    return cls(models.ManyheadsConfig(**settings, **where))


def placed(task: Task | type[Task], spec: Specs, layers: int | None = None) -> dict[str, Any]:
    """Where the mechanism, or those of a hybrid, go in a model of so many layers. Raises ValueError where the task has
    no place."""
    specs = [dict(one) for one in ([spec] if isinstance(spec, Mapping) else spec)]
    names = [one["name"] for one in specs]
    for name in names:
        if missing := unpassed(name, task):
            raise ValueError(missing)
    patterns = common_patterns(names)
    if task.pattern in patterns and len(specs) == 1 and (among := _among_others(specs[0], layers or 2)):
        return {**among, "is_causal": task.pattern == Pattern.CAUSAL_SELF}
    if task.pattern in patterns:
        if Pattern(task.pattern).cross:
            return {"layers": ["softmax"], "cross_layers": specs}
        causal = None if task.pattern in _SHAPED else task.pattern == Pattern.CAUSAL_SELF
        return {"layers": specs, "is_causal": causal}
    pools = task.head in ("sequence-classification", "image-classification")
    if task.pattern in _SHAPED and Pattern.NONCAUSAL_SELF in patterns:
        return {"layers": specs, "is_causal": False}
    if task.head == "object-detection" and Pattern.NONCAUSAL_CROSS in patterns:
        return {"layers": ["softmax"], "cross_layers": specs}
    if pools and Pattern.POOL in patterns and len(specs) == 1:  # there is one pooling in a model
        return {"layers": ["softmax"], "pooling": specs[0]}
    declared = ", ".join(sorted(patterns))
    raise ValueError(f"{task.name} needs {task.pattern}; {','.join(names)} declares {declared}")


def _among_others(spec: dict[str, Any], layers: int) -> dict[str, Any]:
    """Where a mechanism goes that reads other layers: what reads those below it is the last one, or follows one whose
    weights it shares, and what reads a higher one's output stands before the first. Empty for every other."""
    takes = mechanism_class(spec["name"]).card.takes
    if "higher" in takes:
        return {"layers": ["softmax"], "back": spec}
    if "earlier" in takes:
        return {"layers": ["softmax"] * (layers - 1) + [spec]}
    if "weights_below" in takes:
        return {"layers": ["softmax"][: layers - 1] + [spec] * max(1, layers - 1)}  # alone, the model refuses it
    return {}


def unpassed(name: str, task: Task | type[Task] | None = None) -> str:
    """'' where the task's tokens, and what it gives beside them, are all that the mechanism must have; else what it
    reads that the task (None: any task) has not, as a reason to train nothing."""
    card = mechanism_class(name).card
    # Of another pattern, what goes by the same name is another thing.
    tasks = [each for each in ([task] if task else map(task_class, list_tasks())) if each.pattern in card.patterns]
    given = {key for each in tasks for key in each.beside} | _had(card.patterns)
    read = {key: what for key, what in card.takes.items() if key not in given and not what.startswith("optional")}
    words = "; ".join(f"{key} ({what})" for key, what in read.items())
    which = f"{task.name} has it not" if task else "no task has it"
    return f"{name} reads more than its tokens, and {which}: {words}" if read else ""


def _had(patterns: Set[Pattern]) -> set[str]:
    """What every model has itself for a mechanism of these patterns."""
    had = {Pattern.CAUSAL_SELF: {"earlier", "higher", "weights_below"}, Pattern.NONCAUSAL_SELF: {"weights_below"}}
    had |= {Pattern.POOL: {"earlier"}}
    return {name for pattern, names in had.items() if pattern in patterns for name in names}


def has_place(task: Task | type[Task], name: str) -> bool:
    """Whether the task's model has a place for the mechanism."""
    try:
        placed(task, {"name": name})
    except ValueError:
        return False
    return True


def _decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only: gains, biases, decays and frequencies keep what they learn."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _accelerator(device: str, precision: str) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda and there is no CUDA device here; want device auto or cpu")
    mixed = {"float32": "no", "bfloat16": "bf16"}[precision]
    wanted = "cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda"
    held = AcceleratorState._shared_state  # one per process, and it refuses another precision or device
    if held and (held.get("_mixed_precision"), held["device"].type) != (mixed, wanted):
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=wanted == "cpu", mixed_precision=mixed)
