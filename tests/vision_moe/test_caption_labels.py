"""Labels that captions tell, where captions tell them."""

import numpy as np
import pytest

from vision_moe import CaptionLabels

K, LENGTH = 3, 12


def captions(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels: the image cluster is that of the word named first, of those from 10 on;
    the text cluster is told by a word from 20 on, wherever it stands."""
    rng = np.random.default_rng(seed)
    text, image = rng.integers(K, size=(2, number))
    tokens = np.zeros((number, LENGTH), np.int64)
    for row, (of_text, of_image) in enumerate(zip(text, image, strict=True)):
        others = [*(10 + (of_image + rng.permutation([1, 2])) % K), 20 + of_text, 1, 2, 3]
        tokens[row, 0] = 10 + of_image
        tokens[row, 1 : 1 + len(others)] = rng.permutation(others)
    return tokens, K * text + image


def test_words_and_their_order_tell_the_labels() -> None:
    by_captions = CaptionLabels(*captions(300, seed=0), clusters=(K, K))
    tokens, labels = captions(500, seed=1)
    guessed = by_captions.guess(tokens)
    assert guessed.dtype == np.int8
    # Measured: 1.0.
    assert np.mean(guessed == labels) > 0.99
    assert min(by_captions.agreement) > 0.98


def test_labels_of_one_modality() -> None:
    tokens, labels = captions(300, seed=0)
    by_captions = CaptionLabels(tokens, labels // K, clusters=(K,))
    tokens, labels = captions(500, seed=1)
    assert np.mean(by_captions.guess(tokens) == labels // K) > 0.99
    assert len(by_captions.agreement) == 1


def test_agreement_is_that_of_other_captions() -> None:
    """With as many words as it takes to know each caption by heart."""
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(1, 40_000, size=(300, LENGTH)), rng.integers(K, size=300)
    (agreement,) = CaptionLabels(tokens, labels, clusters=(K,)).agreement
    assert agreement == pytest.approx(1 / K, abs=0.1)


def test_what_fills_up_a_caption_tells_nothing() -> None:
    tokens, labels = captions(300, seed=0)
    longer = np.pad(tokens, ((0, 0), (0, 9)))
    one, two = (CaptionLabels(some, labels, clusters=(K, K)) for some in (tokens, longer))
    np.testing.assert_array_equal(one.guess(longer), two.guess(tokens))
    assert one.agreement == two.agreement
