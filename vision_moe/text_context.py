"""A longer text context for a trained CLIP, as Long-CLIP (arXiv 2403.15378) stretches it.

P positions before, L after, D width.
"""

from typing import TYPE_CHECKING

import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from vision_moe.errors import InputError

if TYPE_CHECKING:
    from vision_moe.modeling import CLIPMoEModel

#: Long-CLIP's: the positions that short captions have trained well stay as they are.
NUM_KEPT = 20


def stretch_positions(table: Tensor, length: int) -> Tensor:
    """Keep the first 20 rows and draw the others apart, with straight lines between them.

    Beyond the last row the line through the last two goes on. From 77 to 248 these are Long-CLIP's
    own numbers.

    Args:
        table: ``(P, D)``.
        length: L.

    Returns:
        ``(L, D)``.
    """
    num_rest = len(table) - NUM_KEPT
    if num_rest < 2 or length < len(table):
        raise InputError(
            f"a text context of {len(table)} positions cannot be stretched to {length}: it keeps"
            f" its first {NUM_KEPT}, and needs two more at least"
        )
    new = torch.arange(length - NUM_KEPT, dtype=torch.float64)
    source = new * num_rest / (length - NUM_KEPT)                   # a place among the other rows
    low = source.floor().long().clamp(max=num_rest - 2)
    share = (source - low).unsqueeze(-1)                            # above 1 beyond the last row
    rest = table[NUM_KEPT:].double().cpu()
    stretched = (1 - share) * rest[low] + share * rest[low + 1]
    return torch.cat([table[:NUM_KEPT], stretched.to(table.device, table.dtype)])


@torch.no_grad()
def stretch_text_context(model: "CLIPMoEModel", context_length: int) -> "CLIPMoEModel":
    """Let a CLIP read texts of ``context_length`` tokens; its configuration says so too.

    Args:
        model: one whose text positions are a table, as open_clip's own text towers'; changed in
            place.
        context_length: Long-CLIP's is 248.

    Returns:
        ``model``.
    """
    text = model.text
    if not isinstance(text, TextTransformer):
        raise InputError(
            f"a {type(text).__name__} text tower has its positions from its own configuration:"
            " its context cannot be stretched"
        )
    table = text.positional_embedding
    if text.cls_emb is None:
        stretched = stretch_positions(table, context_length)
    else:                                                           # CoCa's CLS comes last
        stretched = torch.cat([stretch_positions(table[:-1], context_length), table[-1:]])
    text.positional_embedding = nn.Parameter(stretched, requires_grad=table.requires_grad)
    text.context_length, text.num_pos = context_length, len(stretched)
    if text.attn_mask is not None:
        mask = text.build_causal_mask()
        text.attn_mask = mask.to(text.attn_mask.device, text.attn_mask.dtype)
    assert model.config.open_clip_config is not None
    model.config.open_clip_config["text_cfg"]["context_length"] = context_length
    model.__dict__.pop("tokenizer", None)                           # made when it is asked for
    return model
