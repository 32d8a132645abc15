"""What holds for every task."""

import json
import math
from itertools import islice

import pytest
import torch
from torch.testing import assert_close

from manyheads.card import Pattern
from manyheads.tasks import (
    IGNORED,
    KNOWN_AS,
    Batch,
    Task,
    create_task,
    list_tasks,
    register_task,
    task_class,
    task_group,
)
from manyheads.tasks.task import regrouped

HEADS = {"causal-lm", "seq2seq-lm", "sequence-classification", "image-classification", "semantic-segmentation"}
HEADS |= {"object-detection", "node-classification", "token-classification"}
SETTINGS = {
    "vocab_size",
    "num_labels",
    "max_length",
    "image_size",
    "patch_size",
    "num_channels",
    "decoder_causal",
    "num_queries",
    "num_node_features",
    "num_token_kinds",
    "max_2d_position_embeddings",
}
METRICS = {
    ("accuracy", True),
    ("whole answers right", True),
    ("pixel accuracy on digits", True),
    ("bits_per_byte", False),
    ("bits_per_base", False),
    ("squared error", False),
    ("matched overlap", True),
}
every_task = pytest.mark.parametrize("name", list_tasks())
# Of those whose answers are classes at places; sets of boxes are in test_located.
every_classifying = pytest.mark.parametrize(
    "name", [n for n in list_tasks() if task_class(n).head != "object-detection"]
)


def small(name: str) -> Task:
    config: dict[str, dict[str, object]] = {
        "recall": {"n": 32, "vocabulary": 64, "pairs": 4},
        "induction": {"n": 16, "vocabulary": 32, "queries": 4},
        "gcog": {"split": "distractors"},
    }
    return create_task(name, **config.get(name, {}))


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.targets, other.targets) and all(
        torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs | other.inputs
    )


def rows(batch: Batch) -> list[bytes]:
    """What two examples share if and only if they are equal: numbers by their bytes, of which zero has two sorts."""
    parts = [part.flatten(1) for part in batch.inputs.values()]
    return [row.tobytes() for row in (torch.cat(parts, dim=1) + 0).numpy()]


def test_names() -> None:
    assert list_tasks() == [
        "cluttered",
        "communities",
        "completion",
        "counted",
        "counting",
        "digits-grid",
        "digits-patches",
        "digits-pixels",
        "far-away",
        "forecast",
        "forms",
        "functions",
        "gcog",
        "induction",
        "locate",
        "lookup",
        "masked-text",
        "maze",
        "maze-masked",
        "modalities",
        "nucleotides",
        "recall",
        "segmented",
        "selective-copy",
        "super-resolution",
        "text",
        "transduce",
    ]
    used = {task_class(name).pattern for name in list_tasks()}
    assert used == {"noncausal-self", "causal-self", "noncausal-cross", "causal-cross", "grid", "graph"}


@every_task
def test_describes_itself(name: str) -> None:
    task = small(name)
    assert task.name == name
    assert task.title
    assert task.pattern in set(Pattern)
    assert task.head in HEADS
    assert (task.metric, task.higher_is_better) in METRICS
    assert set(task.model_settings()) <= SETTINGS
    assert task.n >= 1
    assert task.__doc__


@every_task
def test_config_makes_the_task_again(name: str) -> None:
    task = small(name)
    assert create_task(name, **json.loads(json.dumps(task.config))) == task


@every_classifying
def test_inputs_fit_the_model_settings(name: str) -> None:
    task = small(name)
    settings = task.model_settings()
    for batch in (next(task.train_batches(5, 0)), next(task.eval_batches(5))):
        for key, part in batch.inputs.items():
            if key == "pixel_values":
                assert part.shape == (5, settings["num_channels"], settings["image_size"], settings["image_size"])
                assert part.dtype == torch.float32
                continue
            if task.pattern == "graph":
                width = settings["num_node_features"]
                assert {"node_features": 5 * task.n * width}.get(key, part.numel()) == part.numel()
                assert key == "node_features" or 0 <= part.min() <= part.max() < task.n
                continue
            assert part.dtype == torch.long
            assert part.shape[0] == 5
            assert part.shape[1] <= settings["max_length"]
            assert part.min() >= 0
            most = {"token_kinds": "num_token_kinds", "boxes": "max_2d_position_embeddings"}.get(key, "vocab_size")
            assert part.max() < settings[most]
        classes = settings.get("num_labels", settings.get("vocab_size"))
        asked = batch.targets[batch.targets != IGNORED]
        assert len(asked) >= 5
        assert asked.min() >= 0
        assert asked.max() < classes
        answering = {
            "causal-lm": "input_ids",
            "token-classification": "input_ids",
            "seq2seq-lm": "decoder_input_ids",
        }.get(task.head)
        expected = (5,) if answering is None else batch.inputs[answering].shape
        if task.head == "semantic-segmentation":
            expected = (5, settings["image_size"], settings["image_size"])
        if task.head == "node-classification":
            expected = (5, task.n)
        assert batch.targets.shape == expected
        assert (
            set(batch.inputs) - {"token_kinds", "boxes"}
            == {
                "causal-lm": {"input_ids"},
                "seq2seq-lm": {"input_ids", "decoder_input_ids"},
                "sequence-classification": {"input_ids"},
                "token-classification": {"input_ids"},
                "image-classification": {"pixel_values"},
                "semantic-segmentation": {"pixel_values"},
                "node-classification": {"node_features", "edges", "edge_labels"},
            }[task.head]
        )
        assert ("decoder_causal" in settings) == (task.head == "seq2seq-lm")


@every_task
def test_training_is_reproducible_from_the_seed(name: str) -> None:
    task = small(name)
    first, again, other = (list(islice(task.train_batches(8, seed), 3)) for seed in (3, 3, 4))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))
    assert not same(first[0], first[1])


@every_task
def test_training_does_not_touch_the_global_generator(name: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(small(name).train_batches(4, 0))
    list(islice(small(name).eval_batches(4), 2))
    assert torch.equal(torch.get_rng_state(), before)


@every_task
def test_evaluation_is_the_same_whatever_the_batch_size(name: str) -> None:
    task = small(name)
    whole_set, in_parts = (list(task.eval_batches(size)) for size in (4096, 100))
    assert len(whole_set) == 1
    assert {len(batch.targets) for batch in in_parts[:-1]} == {100}
    joined = in_parts[0]
    for part in in_parts[1:]:
        joined = joined.joined(part)
    assert same(whole_set[0], joined)


@every_task
def test_evaluation_is_not_in_the_training_data(name: str) -> None:
    task = small(name)
    unseen = set(rows(next(task.eval_batches(4096))))
    assert len(unseen) > 200
    for seed in (0, 1):
        for batch in islice(task.train_batches(64, seed), 40):
            assert unseen.isdisjoint(rows(batch))


@every_classifying
def test_scores(name: str) -> None:
    """Logits that are certain of the targets score best, and what stands where nothing is asked does not count."""
    task = small(name)
    batch = next(task.eval_batches(300))
    settings = task.model_settings()
    classes = settings.get("num_labels", settings.get("vocab_size"))
    asked = batch.targets != IGNORED
    if task.metric == "pixel accuracy on digits":
        asked &= batch.targets != classes - 1  # the background
    certain = torch.full((*batch.targets.shape, classes), -50.0)
    certain.scatter_(-1, batch.targets.clamp(min=0)[..., None], 50.0)
    certain[~asked] = math.nan
    total, count = task.score(certain, batch.targets)
    assert count == (len(asked) if task.metric == "whole answers right" else int(asked.sum()))
    assert total == (count if task.higher_is_better else pytest.approx(0.0))
    nothing = task.score(certain, torch.full_like(batch.targets, IGNORED))
    assert nothing == (0.0, 0)


@every_classifying
def test_a_diverged_model_scores_nan(name: str) -> None:
    task = small(name)
    batch = next(task.eval_batches(3))
    total, count = task.score(torch.full((*batch.targets.shape, 300), math.nan), batch.targets)
    assert math.isnan(total)
    assert count > 0


def test_scores_in_low_precision_are_summed_in_double() -> None:
    task = create_task("text")
    logits = torch.zeros(3, 1000, 256, dtype=torch.bfloat16)
    total, count = task.score(logits, torch.zeros(3, 1000, dtype=torch.long))
    assert_close(total / count, 8.0, rtol=0, atol=1e-12)


def test_misaligned_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"recall: logits \[2, 7, 9\] do not fit targets \[2, 8\]"):
        create_task("recall").score(torch.zeros(2, 7, 9), torch.zeros(2, 8, dtype=torch.long))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'recal'; did you mean 'recall'"):
        create_task("recal")
    with pytest.raises(ValueError, match=r"has no argument 'vocab'; did you mean 'vocabulary'\?; it takes \['eval_ex"):
        create_task("recall", vocab=3)
    with pytest.raises(ValueError, match=r"task digits-grid has no argument 'n'; it takes none"):
        create_task("digits-grid", n=3)
    with pytest.raises(ValueError, match=r"task text has no argument 'title'"):
        create_task("text", title="x")
    with pytest.raises(ValueError, match="two tasks are named 'recall'"):
        register_task(task_class("recall"))


def test_a_paper_finds_its_task() -> None:
    assert task_group("mqar") == ("recall",)
    assert set(KNOWN_AS.values()) <= set(list_tasks())
    assert not set(KNOWN_AS) & set(list_tasks())


BAD = [
    ("recall", {"n": 0}, r"recall: n=0; want a whole number from 4"),
    ("recall", {"n": "128"}, r"n='128'"),
    ("recall", {"pairs": True}, r"pairs=True"),
    ("recall", {"n": 1 << 40}, r"n=1099511627776"),
    ("recall", {"n": 32, "pairs": 9}, r"pairs=9 do not fit n=32.*4 pairs <= n.*pairs <= 8, or n >= 36"),
    ("recall", {"vocabulary": 17}, r"vocabulary=17 has 7 keys.*want vocabulary >= 18"),
    ("recall", {"vocabulary": 1 << 40}, r"vocabulary=1099511627776"),
    ("recall", {"pairs": 0}, r"pairs=0"),
    ("recall", {"power_a": 0}, r"power_a=0; want a number above 0"),
    ("recall", {"power_a": math.nan}, r"power_a=nan"),
    ("recall", {"power_a": "low"}, r"power_a='low'"),
    ("recall", {"random_non_queries": 1}, r"random_non_queries=1; want true or false"),
    ("recall", {"eval_examples": 0}, r"eval_examples=0"),
    ("induction", {"n": 64, "vocabulary": 63}, r"vocabulary=63; want .* from 64 .*no token twice in n=64"),
    ("induction", {"n": 8, "queries": 4}, r"queries=4; want a whole number from 1 to 3"),
    ("induction", {"n": 3}, r"induction: n=3"),
    ("selective-copy", {"n": 20, "tokens": 11}, r"tokens=11; want a whole number from 1 to 10"),
    ("selective-copy", {"vocabulary": 3}, r"vocabulary=3"),
    ("selective-copy", {"n": 1}, r"n=1"),
    ("lookup", {"n": 7}, r"lookup: n=7; want an even length"),
    ("lookup", {"n": 0}, r"lookup: n=0"),
    ("lookup", {"n": 64, "vocabulary": 63}, r"vocabulary=63; want a whole number from 64"),
    ("transduce", {"n": 0}, r"transduce: n=0"),
    ("transduce", {"kind": "shuffle"}, r"kind='shuffle'; want one of \['reverse', 'sort', 'copy', 'mixed'\]"),
    ("transduce", {"vocabulary": 5}, r"vocabulary=5; want a whole number from 6"),
    ("text", {"n": 0}, r"text: n=0"),
    ("text", {"max_bytes": 0}, r"max_bytes=0"),
    ("text", {"eval_windows": 0}, r"eval_windows=0"),
    ("text", {"folder": 3}, r"folder=3"),
]


@pytest.mark.parametrize(("name", "config", "message"), BAD)
def test_bad_settings(name: str, config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task(name, **config)


@every_task
def test_bad_batch_sizes_are_refused_at_once(name: str) -> None:
    for size in (0, -1, 2.0, 1 << 30):
        with pytest.raises(ValueError, match=f"{name}: batch_size={size}"):
            small(name).train_batches(size, 0)
        with pytest.raises(ValueError, match=f"{name}: batch_size={size}"):
            small(name).eval_batches(size)


def test_smallest_settings_work() -> None:
    for name, config in [
        ("recall", {"n": 4, "vocabulary": 4, "pairs": 1}),
        ("induction", {"n": 4, "vocabulary": 4, "queries": 1}),
        ("selective-copy", {"n": 2, "vocabulary": 4, "tokens": 1}),
        ("lookup", {"n": 2, "vocabulary": 4}),
        ("transduce", {"n": 1, "vocabulary": 6, "kind": "mixed"}),
        ("text", {"n": 1}),
    ]:
        assert len(next(create_task(name, **config).train_batches(3, 0)).targets) == 3


def test_regrouped_keeps_every_example_in_order() -> None:
    pieces = [Batch({"x": torch.arange(a, b)}, torch.arange(a, b)) for a, b in [(0, 3), (3, 4), (4, 11), (11, 12)]]
    groups = list(regrouped(pieces, 5))
    assert [group.targets.tolist() for group in groups] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert [group.inputs["x"].tolist() for group in groups] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert list(regrouped(pieces, 6))[-1].targets.tolist() == [6, 7, 8, 9, 10, 11]
