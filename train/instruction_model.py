"""LLaVA for training on shared-prefix rows: a batch in, the loss out.

B rows, L padded length, M labelled tokens, N image tokens, V tower width, D width of the language
model, H, W sides of a picture.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from mllm.tiles import pack_views
from train.chunked_loss import summed_loss
from train.frozen_blocks import runs_frozen_blocks, use_frozen_blocks
from train.instruction_data import PADDING, shared_prefix_mask
from train.router_losses import RouterLosses, RouterSettings
from train.row_attention import LineOfRows, use_row_attention
from train.row_threads import run_in_threads
from vision_moe import num_filling_rows


class InstructionModel(nn.Module):
    """Wraps a stock LLaVA. Its tower's features come with the batch, or pictures if it trains.

    The same function as ``LlavaForConditionalGeneration.forward`` with labels, but logits are
    computed only where there is a label: over a vocabulary of 49,152 they are else the larger part
    of a small model's work.

    Args:
        llava: What trains, in part.
        routers: Those that take part.
        int8_products: See :class:`train.recipe.InstructionRecipe`.
    """

    # The trainer then passes num_items_in_batch, and leaves the scaling to the loss here.
    accepts_loss_kwargs = True

    def __init__(
        self,
        llava: LlavaForConditionalGeneration,
        routers: RouterSettings | None = None,
        int8_products: bool = False,
    ) -> None:
        super().__init__()
        self.llava = llava
        use_row_attention(llava.model.language_model)
        use_frozen_blocks(llava.model.language_model, int8_products)
        self.router_losses = RouterLosses(llava, routers)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        branch_ids: Tensor,
        token_places: Tensor,
        row_lengths: Tensor,
        label_positions: Tensor,
        labels: Tensor,
        read_tokens: Tensor,
        image_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Cross-entropy of the labelled tokens, and the routers' losses where some take part.

        The latter are averaged over the batches of an optimiser step by their labelled tokens, so
        that several processes and gradient accumulation come to the same.

        Args:
            input_ids: ``(B, L)``.
            position_ids: ``(B, L)``.
            branch_ids: ``(B, L)``, see :func:`shared_prefix_mask`.
            token_places: ``(T,)``, where a token is, not padding; into the flattened ``(B * L)``.
            row_lengths: ``(B,)``, tokens of each row.
            label_positions: ``(M,)`` into the flattened ``(B * L)``.
            labels: ``(M,)``.
            read_tokens: Those of the T that have a label to predict, each once.
            image_features: ``(I, N, V)``, in the order of the pictures' tokens; or
            pixel_values: ``(I, 3, H, W)``.
            image_sizes: ``(I', 2)``, heights and widths of pictures whose views, one after another,
                the former are; of a model that is shown tiles.
            num_items_in_batch: What the summed loss is divided by: the labels of all batches of an
                optimiser step. M by default.

        Returns:
            ``loss``, a scalar.
        """
        model = self.llava.model
        # The rows end to end: no layer but attention sees rows, and none computes padding.
        is_token = (branch_ids != PADDING).flatten()                              # (B * L)
        line = input_ids.flatten()[token_places][None]                            # (1, T)
        embeddings = model.language_model.get_input_embeddings()(line)            # (1, T, D)
        is_image = (line == self.llava.config.image_token_id).unsqueeze(-1)
        with self.router_losses.watch(self.llava) as watched:
            if image_features is None:
                assert pixel_values is not None, "a batch without pictures"
                image_features = self._tower_features(pixel_values)
            connector = model.multi_modal_projector
            projected = connector(image_features.to(next(connector.parameters()).dtype))
        if image_sizes is not None:
            projected = pack_views(model, projected, image_sizes)
        embeddings = embeddings.masked_scatter(is_image, projected.to(embeddings.dtype))
        bias = _bias(shared_prefix_mask(branch_ids), embeddings.dtype)
        rows = LineOfRows(token_places, bias, row_lengths, read_tokens)
        output = self._read_rows(embeddings, position_ids.flatten()[token_places][None], rows)
        has_pictures = len(image_features) > 0 and labels.numel() > 0
        all_tokens = torch.ones_like(line, dtype=torch.bool)
        auxiliary = self.router_losses(watched, output, all_tokens, has_pictures)
        places_in_line = is_token.cumsum(0) - 1
        hidden = output.last_hidden_state[0, places_in_line[label_positions]]     # (M, D)
        total = summed_loss(self.llava.lm_head, hidden, labels)
        if auxiliary is not None:
            total = total + labels.numel() * auxiliary
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}

    def _read_rows(self, embeddings: Tensor, position_ids: Tensor, rows: LineOfRows) -> Any:
        """The language model's output, of which ``last_hidden_state`` is ``(1, T, D)``."""
        llm = self.llava.model.language_model

        def read(line: Tensor, positions: Tensor, its_rows: LineOfRows) -> Any:
            return llm(
                inputs_embeds=line,
                position_ids=positions,
                attention_mask=its_rows.bias,
                rows=its_rows,
                use_cache=False,
                **self.router_losses.llm_arguments,
            )

        if not runs_frozen_blocks(llm, rows):
            return read(embeddings, position_ids, rows)

        def read_part(part: Tensor, place: slice, its_rows: LineOfRows) -> Tensor:
            extra = num_filling_rows(part.shape[1])
            line = F.pad(part, (0, 0, 0, extra))
            positions = F.pad(position_ids[:, place], (0, extra))
            hidden: Tensor = read(line, positions, its_rows).last_hidden_state
            return hidden[:, : part.shape[1]]

        trained = [one for one in llm.parameters() if one.requires_grad]
        hidden = run_in_threads(read_part, embeddings, rows, trained)
        return BaseModelOutput(last_hidden_state=hidden)  # type: ignore[arg-type]

    def checkpoint_blocks(self) -> None:
        """Let the language model's blocks be computed again in the backward pass."""

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the newer name came within version 5
            self.llava.model.language_model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )

    def num_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """Of a batch, without padding."""
        return (batch["branch_ids"] != PADDING).sum()

    def pop_curves(self) -> dict[str, float]:
        """The routers' losses and loads since the last call, for the log."""
        return self.router_losses.pop_curves()

    def _tower_features(self, pixel_values: Tensor) -> Tensor:
        config = self.llava.config
        num_images = len(pixel_values)
        if num_images == 0:
            # The tower runs all the same: data-parallel training waits for its gradients.
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        states = self.llava.model.vision_tower(pixel_values, output_hidden_states=True)
        drop_first = config.vision_feature_select_strategy == "default"
        features: Tensor = states.hidden_states[config.vision_feature_layer][:, int(drop_first) :]
        return features[:num_images]


def _bias(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``sees``, else negative infinity, in the format that the layers compute in."""
    kind = sees.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, -torch.inf)
