"""Which words the connector starts with, and which token says them."""

import torch

from train.connector_start import words_of_cls

COLORS, SHAPES = ("red", "green", "blue", "black"), ("circle", "square")


def pictures(patches_know: str) -> tuple[torch.Tensor, list[set[str]]]:
    """Two hundred pictures of one colored shape; the CLS token knows both words."""
    generator = torch.Generator().manual_seed(0)
    color = torch.randint(len(COLORS), (200,), generator=generator)
    shape = torch.randint(len(SHAPES), (200,), generator=generator)
    one_hot = torch.cat([torch.eye(4)[color], torch.eye(2)[shape]], 1)  # (200, 6)
    patch = one_hot.clone()
    patch[:, 4:] *= patches_know == "shape"
    patch[:, :4] *= patches_know == "color"
    tokens = torch.stack([one_hot, patch, patch], 1)
    tokens = tokens + 0.01 * torch.randn(tokens.shape, generator=generator)
    words = [{COLORS[c], SHAPES[s]} for c, s in zip(color.tolist(), shape.tolist(), strict=True)]
    return tokens, words


def test_cls_says_what_the_patches_do_not_know() -> None:
    assert words_of_cls(*pictures("color")) == set(SHAPES)
    assert words_of_cls(*pictures("shape")) == set(COLORS)


def test_words_that_are_never_said_together_stay_together() -> None:
    tokens, words = pictures("color")
    assert words_of_cls(tokens, [of & set(COLORS) for of in words]) == set()


def test_word_of_every_picture_tells_nothing() -> None:
    tokens, words = pictures("color")
    assert words_of_cls(tokens, [{"picture"} for _ in words]) == set()
