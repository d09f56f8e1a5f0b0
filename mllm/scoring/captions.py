"""CIDEr-D: how much a caption says what the references agree on (arXiv 1411.5726, section 4).

With h and r the tf-idf weighted counts of n-grams in a hypothesis and in a reference, for each n
from 1 to 4,

    sim(h, r) = sum(min(h, r) * r) / (|h| |r|) * exp(-(len(h) - len(r))**2 / (2 * 6**2))

and a caption scores ten times the mean over n and over its references.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

from mllm.scoring.checks import input_error, require_same_length, require_text

_MAX_N = 4
_SIGMA = 6.0  # words
_SCALE = 10.0
# As in the Penn Treebank: isn't -> is n't, dog's -> dog 's; u.s., 3.5, 10:30, t-shirt stay whole.
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_WORD = re.compile(
    r"(?:[a-z]\.){2,}|'(?:s|re|ve|ll|d|m)\b|\w+(?:(?<=\d)[.,:](?=\d)\w+|[-'/]\w+)*|[&$%#]"
)

_NGram = tuple[str, ...]


class CiderScores(NamedTuple):
    """The mean over the corpus, and the score of each caption; 0 to 10."""

    mean: float
    per_item: list[float]


class _Vector(NamedTuple):
    """A caption's tf-idf weights by n-gram, one mapping and one norm for each n."""

    weights: list[dict[_NGram, float]]
    norms: list[float]
    num_words: int


def caption_words(caption: str) -> list[str]:
    """Lower-cased words without punctuation, split as the Penn Treebank splits contractions.

    COCO's own evaluation runs the Java tokeniser of Stanford CoreNLP. Both agree on plain captions;
    they differ, for instance, on ``Mr.``, on brackets (which it keeps as words) and on ``cannot``.
    """
    return _WORD.findall(_CLITIC.sub(r" \1", caption.lower().replace("’", "'")))


def cider(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenize: Callable[[str], list[str]] = caption_words,
) -> CiderScores:
    """CIDEr-D of a corpus.

    The idf comes from the references of these very images, so a score holds for this set of
    images only; an n-gram found with every image weighs nothing. It follows that one image alone
    always scores 0.

    Args:
        predictions: One caption for each image.
        references: The human captions of each image, one or more.
        tokenize: Text to words; ``str.split`` for texts that are tokenised already.

    Raises:
        InputError: Nothing to score, unequal lengths, or an image without references.
        TypeError: A caption is not a string, or an image's references are one string.
    """
    require_same_length(predictions=predictions, references=references)
    for index, (prediction, captions) in enumerate(zip(predictions, references, strict=True)):
        require_text(prediction, f"prediction {index}")
        if isinstance(captions, str):
            raise TypeError(f"references {index} must be a sequence of strings, not one string")
        if len(captions) == 0:
            raise input_error(f"references {index}: there are none")
        for caption in captions:
            require_text(caption, f"each of references {index}")

    reference_counts = [
        [_ngram_counts(tokenize(caption)) for caption in captions] for captions in references
    ]
    idf = _inverse_document_frequency(reference_counts)
    per_item = []
    for prediction, counts_of_image in zip(predictions, reference_counts, strict=True):
        hypothesis = _vector(_ngram_counts(tokenize(prediction)), idf)
        similarities = [_similarity(hypothesis, _vector(each, idf)) for each in counts_of_image]
        per_item.append(_SCALE * sum(similarities) / len(similarities))
    return CiderScores(sum(per_item) / len(per_item), per_item)


def _ngram_counts(words: list[str]) -> list[Counter[_NGram]]:
    return [
        Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
        for n in range(1, _MAX_N + 1)
    ]


def _inverse_document_frequency(
    references: list[list[list[Counter[_NGram]]]],
) -> Callable[[_NGram], float]:
    num_images_with: Counter[_NGram] = Counter()
    for captions in references:
        num_images_with.update(set(chain.from_iterable(chain.from_iterable(captions))))
    log_num_images = math.log(len(references))
    # An n-gram of no reference counts as that of one.
    return lambda ngram: log_num_images - math.log(max(1, num_images_with[ngram]))


def _vector(counts: list[Counter[_NGram]], idf: Callable[[_NGram], float]) -> _Vector:
    weights = [
        {ngram: count * idf(ngram) for ngram, count in of_length.items()} for of_length in counts
    ]
    norms = [math.sqrt(sum(weight**2 for weight in each.values())) for each in weights]
    return _Vector(weights, norms, num_words=counts[0].total())


def _similarity(hypothesis: _Vector, reference: _Vector) -> float:
    """The mean over n, from 0 to 1."""
    total = 0.0
    for n in range(_MAX_N):
        norm = hypothesis.norms[n] * reference.norms[n]
        if norm == 0.0:  # too short for this n, or nothing but n-grams that every image has
            continue
        theirs = reference.weights[n]
        # min: repeating a word of the reference gains nothing.
        shared = sum(
            min(weight, theirs[ngram]) * theirs[ngram]
            for ngram, weight in hypothesis.weights[n].items()
            if ngram in theirs
        )
        total += shared / norm
    difference = hypothesis.num_words - reference.num_words
    return total / _MAX_N * math.exp(-(difference**2) / (2 * _SIGMA**2))
