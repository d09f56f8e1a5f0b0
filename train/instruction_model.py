"""LLaVA for training on shared-prefix rows: a batch in, the loss out.

B rows, L padded length, M labelled tokens, N image tokens, V tower width, D width of the language
model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration

from train.attention import attention_kernel
from train.instruction_data import shared_prefix_mask

_LOGITS_CHUNK = 512


class InstructionModel(nn.Module):
    """Wraps a stock LLaVA, whose tower's features come with the batch.

    The same function as ``LlavaForConditionalGeneration.forward`` with labels, but logits are
    computed only where there is a label: over a vocabulary of 49,152 they are else the larger part
    of a small model's work.
    """

    # The trainer then passes num_items_in_batch, and leaves the scaling to the loss here.
    accepts_loss_kwargs = True

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        branch_ids: Tensor,
        label_positions: Tensor,
        labels: Tensor,
        image_features: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Cross-entropy of the labelled tokens.

        Args:
            input_ids: ``(B, L)``.
            position_ids: ``(B, L)``.
            branch_ids: ``(B, L)``, see :func:`shared_prefix_mask`.
            label_positions: ``(M,)`` into the flattened ``(B * L)``.
            labels: ``(M,)``.
            image_features: ``(B, N, V)``.
            num_items_in_batch: What the summed loss is divided by: the labels of all batches of an
                optimiser step. M by default.

        Returns:
            ``loss``, a scalar.
        """
        model = self.llava.model
        embeddings = model.language_model.get_input_embeddings()(input_ids)      # (B, L, D)
        is_image = (input_ids == self.llava.config.image_token_id).unsqueeze(-1)
        projected = model.multi_modal_projector(image_features.to(embeddings.dtype))
        embeddings = embeddings.masked_scatter(is_image, projected.to(embeddings.dtype))
        with attention_kernel(embeddings.device, embeddings.shape[1]):
            hidden = model.language_model(
                inputs_embeds=embeddings,
                position_ids=position_ids,
                attention_mask=shared_prefix_mask(branch_ids),
                use_cache=False,
            ).last_hidden_state
        predicting = hidden.flatten(0, 1)[label_positions]                       # (M, D)
        chunks = zip(predicting.split(_LOGITS_CHUNK), labels.split(_LOGITS_CHUNK), strict=True)
        total = torch.stack([self._summed_loss(h, y) for h, y in chunks]).sum()
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}

    def _summed_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        # Logits are recomputed in the backward pass, so that one chunk of them exists at a time.
        loss: Tensor = checkpoint(
            _cross_entropy, self.llava.lm_head, hidden, labels, use_reentrant=False
        )
        return loss


def _cross_entropy(lm_head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = lm_head(hidden)
    return F.cross_entropy(logits.to(torch.float32), labels, reduction="sum")
