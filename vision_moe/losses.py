"""The contrastive loss of a CLIP, over the features of all processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.loss import gather_features
from torch import Tensor


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    label_smoothing: float = 0.0,
    world_size: int = 1,
    rank: int = 0,
    earlier: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Symmetric cross-entropy between pictures and captions (CLIP; smoothing as in CLIP-MoE).

    Args:
        image_features: ``(B, D)``, this process's share of the global batch, of any norm.
        text_features: ``(B, D)``, row i belongs to picture i.
        logit_scale: Inverse temperature (after exp).
        label_smoothing: Of both cross-entropies; the paper uses 0.1.
        world_size: Processes whose features are gathered, with gradient.
        rank: This process.
        earlier: Features ``(M, D)`` of pictures and of texts, of norm 1, that are negatives of
            every pair; the same on every process, without gradient.

    Returns:
        A scalar: the loss of the global batch, equal on every process.
    """
    image = F.normalize(image_features.float(), dim=-1)
    text = F.normalize(text_features.float(), dim=-1)
    if world_size > 1:
        image, text = gather_features(
            image, text, gather_with_grad=True, rank=rank, world_size=world_size
        )
    # Outside autocast: between 64 and 128, where logits reach, bf16 steps by 0.5.
    with torch.autocast(image.device.type, enabled=False):
        of_image = logit_scale * image @ text.T  # (B', B'), B' the global batch
        of_text = of_image.T
        if earlier is not None:  # (B', B' + M)
            images, texts = earlier
            of_image = torch.cat([of_image, logit_scale * image @ texts.T], dim=1)
            of_text = torch.cat([of_text, logit_scale * text @ images.T], dim=1)
        target = torch.arange(len(image), device=image.device)
        return (
            F.cross_entropy(of_image, target, label_smoothing=label_smoothing)
            + F.cross_entropy(of_text, target, label_smoothing=label_smoothing)
        ) / 2
