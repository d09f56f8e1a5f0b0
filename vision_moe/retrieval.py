"""Image-text retrieval: recall at k in both directions.

I images, T texts, P dimensions of the common space.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vision_moe.modeling import CLIPMoEModel

_MAX_SIMILARITIES = 1 << 24


@dataclass(frozen=True)
class RetrievalRanks:
    """How many wrong candidates come before the right one: ``i2t`` ``(I,)``, ``t2i`` ``(T,)``."""

    i2t: Tensor
    t2i: Tensor

    def recall(self, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
        """``i2t_r{k}``: the share, 0 to 1, of images with one of their texts among the first k;
        ``t2i_r{k}``: the share of texts with their image among the first k."""
        ranks = {"i2t": self.i2t, "t2i": self.t2i}
        return {
            f"{d}_r{k}": (rank < k).double().mean().item() for d, rank in ranks.items() for k in ks
        }


def retrieval_recall(
    image_features: Tensor,
    text_features: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    image_of_text: Tensor | None = None,
) -> dict[str, float]:
    """Recall at k from the cosine of features: :func:`retrieval_ranks`, counted."""
    return retrieval_ranks(image_features, text_features, image_of_text).recall(ks)


def retrieval_ranks(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor | None = None
) -> RetrievalRanks:
    """Rank all candidates of every query by the cosine of features.

    A wrong candidate that ties with the right one counts as ahead of it, so that a model whose
    features have collapsed scores 0 and not 1.

    Args:
        image_features: ``(I, P)``, normalised or not.
        text_features: ``(T, P)``.
        image_of_text: ``(T,)`` which image each text describes, every image having at least one
            text; by default text i describes image i.
    """
    images = torch.nn.functional.normalize(image_features.float(), dim=-1)
    texts = torch.nn.functional.normalize(text_features.float(), dim=-1)
    if image_of_text is None:
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images, {len(texts)} texts, and no image_of_text")
        image_of_text = torch.arange(len(texts))
    image_of_text = image_of_text.to(images.device)
    if missing := set(range(len(images))) - set(image_of_text.tolist()):
        raise ValueError(f"image {min(missing)} has no text")
    i2t_ranks, t2i_ranks = [], []
    rows = max(1, _MAX_SIMILARITIES // len(texts))                # bounded memory
    for start in range(0, len(images), rows):
        similarity = images[start : start + rows] @ texts.T
        numbers = torch.arange(start, start + len(similarity), device=images.device)
        own = numbers[:, None] == image_of_text[None, :]
        best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        i2t_ranks.append(((similarity >= best) & ~own).sum(1))
    rows = max(1, _MAX_SIMILARITIES // len(images))
    for start in range(0, len(texts), rows):
        similarity = texts[start : start + rows] @ images.T
        own_image = image_of_text[start : start + rows, None]
        t2i_ranks.append((similarity >= similarity.gather(1, own_image)).sum(1) - 1)
    return RetrievalRanks(torch.cat(i2t_ranks), torch.cat(t2i_ranks))


@torch.inference_mode()
def encode_pairs(
    model: CLIPMoEModel,
    pairs: Iterable[tuple[Image.Image | Tensor, str]],
    batch_size: int = 256,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Encode images and their texts in batches.

    Args:
        model: both towers, used in its present mode.
        pairs: PIL images or ``(3, H, W)`` tensors, each with its text.
        batch_size: pairs at a time.
        progress: a bar on stderr.

    Returns:
        image and text features, ``(N, P)`` each, fp32 on the CPU, not normalised.
    """
    total = len(pairs) if isinstance(pairs, Sized) else None
    image_features, text_features = [], []
    with tqdm(total=total, desc="encoding pairs", unit="pair", disable=not progress) as bar:
        for batch in _batches(pairs, batch_size):
            pixel_values = torch.stack(
                [
                    image if isinstance(image, Tensor) else model.preprocess(image)
                    for image, _ in batch
                ]
            )
            tokens = model.trim_tokens(model.tokenizer([text for _, text in batch]))
            image_features.append(model.encode_image(pixel_values.to(model.device)).float().cpu())
            text_features.append(model.encode_text(tokens.to(model.device)).float().cpu())
            bar.update(len(batch))
    if not image_features:
        raise ValueError("encode_pairs: no pairs")
    return torch.cat(image_features), torch.cat(text_features)


def _batches(
    pairs: Iterable[tuple[Image.Image | Tensor, str]], size: int
) -> Iterator[list[tuple[Image.Image | Tensor, str]]]:
    iterator = iter(pairs)
    while batch := list(islice(iterator, size)):
        yield batch
