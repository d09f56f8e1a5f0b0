"""Pairs of the batches before, whose features are negatives too (cross-batch memory, Wang et al.,
arXiv 1912.06798, section 3.2).

They cost a product, and no pass through a tower. Batches within a cluster tell its pairs apart;
that no cluster's share is forgotten the pairs of other clusters see to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EarlierPairs(nn.Module):
    """The last M pairs, the newest first. A checkpoint holds them.

    Args:
        size: M.
        width: P, of the space that pictures and texts share.
    """

    numbers: Tensor
    images: Tensor
    texts: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("numbers", torch.full((size,), -1))
        self.register_buffer("images", torch.zeros(size, width))
        self.register_buffer("texts", torch.zeros(size, width))

    def features(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Of pictures and of texts ``(m, P)``, each of norm 1; in the beginning m is below M.

        Args:
            batch: ``(B,)``, numbers of pairs that are due again. They are left out: a pair is no
                negative of itself, and of the others the batch itself has it, newer.
        """
        known = (self.numbers >= 0) & ~torch.isin(self.numbers, batch)
        return self.images[known], self.texts[known]

    @torch.no_grad()
    def remember(self, batch: Tensor, images: Tensor, texts: Tensor) -> None:
        """Put pairs ``(B,)``, of features ``(B, P)`` of any norm, in front; the oldest go."""
        units = (F.normalize(features.float(), dim=-1) for features in (images, texts))
        newest = (batch, *units)
        for kept, new in zip((self.numbers, self.images, self.texts), newest, strict=True):
            kept.copy_(torch.cat([new, kept])[: len(kept)])
