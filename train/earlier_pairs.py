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

    images: Tensor
    texts: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(size, width))
        self.register_buffer("texts", torch.zeros(size, width))

    def features(self) -> tuple[Tensor, Tensor]:
        """Of pictures and of texts ``(m, P)``, each of norm 1; in the beginning m is below M."""
        known = self.images.any(dim=1) & self.texts.any(dim=1)
        return self.images[known], self.texts[known]

    @torch.no_grad()
    def remember(self, images: Tensor, texts: Tensor) -> None:
        """Put ``(B, P)``, of any norm, in front; the oldest go."""
        for kept, new in ((self.images, images), (self.texts, texts)):
            newest = F.normalize(new.float(), dim=-1)
            kept.copy_(torch.cat([newest, kept])[: len(kept)])
