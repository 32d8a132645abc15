"""Hidden keys and the retrieval score: the rule by hand, the packaged model's heads, and a model that finds nothing."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from written_heads import random_llama

from manyheads.heads import Inputs, retrieval
from manyheads.heads.retrieval import answer, recall, score
from manyheads.hosts.loading import Loaded
from manyheads.hosts.taps import record


def words_tokenizer(loaded: Loaded) -> Loaded:
    """One token per word or digit with the space before it, and a first token for every text."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w| ?[^\w]"), "isolated")
    pieces = set(map(chr, range(32, 127))) | {f" {chr(c)}" for c in range(32, 127)} | {"\n", " \n"}
    tokenizer.add_tokens(sorted(pieces))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="?")
    return Loaded(loaded.model, fast, "words")


def test_the_rule_by_hand() -> None:
    # Prompt tokens 10..19, the needle is at 3..6; two layers of two heads; five steps say 13, 99, 15, 17, 12.
    best = torch.tensor([[[3, 4], [0, 12]], [[4, 9], [5, 3]], [[5, 5], [7, 5]], [[7, 7], [7, 7]], [[2, 2], [2, 2]]])
    found = score(best[..., None], [13, 99, 15, 17, 12], list(range(10, 20)), (3, 7))
    # Head 0.0 looks at 13 and at 15 when they are said; 0.1 and 1.1 at 15 only; 17 and 12 stand beside the needle.
    assert found.tolist() == [[0.5, 0.25], [0.0, 0.25]]
    # The second best keys of head 0.1 are those of 0.0, and a step counts once: 0.1 has 13 of it, and 15 twice.
    second = best.clone()
    second[:, 0, 1] = best[:, 0, 0]
    found = score(torch.stack([best, second], -1), [13, 99, 15, 17, 12], list(range(10, 20)), (3, 7))
    assert found.tolist() == [[0.5, 0.5], [0.0, 0.25]]


@pytest.mark.parametrize(
    ("wanted", "said", "share"), [([1, 2, 2, 3], [2, 1, 9], 0.5), ([1, 1], [1], 0.5), ([1], [], 0), ([4, 5], [5, 4], 1)]
)
def test_recall_counts_tokens_as_often_as_they_occur(wanted: list[int], said: list[int], share: float) -> None:
    assert recall(wanted, said) == share


@pytest.mark.parametrize("top_k", [1, 3])
def test_best_keys_are_those_of_one_pass(packaged: Loaded, top_k: int) -> None:
    """Decoding with the cache looks where a single pass over prompt and answer looks."""
    inputs = Inputs(packaged)
    needle = inputs.needles(256, 0, depth=0.5)
    best, said = answer(inputs, needle, top_k)
    start = needle.asked[0][0]
    ids = torch.cat([needle.ids[:start], torch.tensor(said)])
    with torch.no_grad(), record(packaged.model) as calls:
        packaged.model(ids[None])
    rows = slice(start - 1, start - 1 + len(said))
    wanted = torch.stack([call.weights(rows=rows)[0].argsort(-1, descending=True)[..., :top_k] for call in calls])
    torch.testing.assert_close(best, wanted.permute(2, 0, 1, 3))
    assert said[:5] == needle.ids[slice(*needle.told[0])].tolist()


def test_the_packaged_model_retrieves_with_layer_1(packaged: Loaded) -> None:
    scores, trials = retrieval(Inputs(packaged), lengths=(256,), depths=(0.0, 0.5, 1.0))
    assert (trials, scores.shape) == (3, (4, 8, 3))
    mean = scores.mean(-1)
    assert mean[1, :4].max() > 0.7
    assert mean[[0, 2, 3]].max() < 0.2


def test_more_keys_find_no_less_and_fewer_than_one_are_refused(packaged: Loaded) -> None:
    inputs = Inputs(packaged)
    (one, _), (two, _) = (retrieval(inputs, lengths=(256,), depths=(0.5,), top_k=k) for k in (1, 5))
    assert (two >= one).all()
    assert (two > one).any()
    with pytest.raises(ValueError, match="top_k=0"):
        retrieval(inputs, lengths=(256,), top_k=0)


def test_a_random_model_scores_nothing() -> None:
    scores, trials = retrieval(Inputs(random_llama()), lengths=(128,), depths=(0.5,))
    assert trials == 1
    assert scores.shape == (3, 6, 0)


@pytest.mark.parametrize("keys", [1, 3])
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_keys_stand_where_they_are_said_to(keys: int, kind: str) -> None:
    loaded = random_llama()
    inputs = Inputs(loaded if kind == "bytes" else words_tokenizer(loaded))
    needles = inputs.needles(500, 7, keys=keys)
    ids = needles.ids.tolist()
    assert len(ids) == 500
    assert (ids[0] == 0) == (kind == "words")
    assert len(needles.told) == len(needles.asked) == keys
    for (start, end), (again, stop) in zip(needles.told, needles.asked, strict=True):
        assert inputs.loaded.decode(ids[start:end]).replace(" ", "").isdigit()
        assert ids[start:end] == ids[again:stop]
        before = inputs.loaded.decode(ids[again - 12 : again]).replace(" ", "")
        assert before.endswith(("keyis", "numberis"))
        assert needles.labels[again - 1 : stop - 1].all()
    assert int(needles.labels.sum()) == sum(end - start for start, end in needles.told)
    assert inputs.needles(500, 7, keys=keys).ids.tolist() == ids
    assert inputs.needles(500, 8, keys=keys).ids.tolist() != ids


def test_depth_says_where() -> None:
    inputs = Inputs(random_llama())
    starts = [inputs.needles(400, 1, depth=depth).told[0][0] for depth in (0.0, 0.5, 1.0)]
    assert starts[0] == len("\nThe pass key is ")
    assert abs(starts[0] + starts[2] - 2 * starts[1]) <= 1
    assert starts[2] > 300


def test_a_haystack_that_is_too_short() -> None:
    with pytest.raises(ValueError, match="give a greater --length"):
        Inputs(random_llama()).needles(64, 0)


def test_repeats_of_a_tokenizer_start_after_its_first_token() -> None:
    ids, period, start = Inputs(words_tokenizer(random_llama())).repeats(41, 0)
    assert (len(ids), period, start) == (41, 10, 1)
    assert int(ids[0]) == 0
    torch.testing.assert_close(ids[1:31], ids[11:])
    assert 0 not in ids[1:]
