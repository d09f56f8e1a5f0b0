"""Several vision towers as one: each sees the picture, and their tokens are laid end to end.

As in MoCHA (arXiv 2507.22805). To LLaVA it is a tower like any other, with ``vision_feature_layer``
-1 and the selection ``full``; the connector ``groups`` gives each tower's tokens a connector of
their own.

B pictures, S side of the joint input, N tokens of all towers, D their common width.

This file imports no other of the toolkit: it is loaded as soon as transformers is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class SeveralTowersConfig(PreTrainedConfig):
    """The towers' configurations, and what is read of each.

    Args:
        towers: Configurations, each with its ``model_type``.
        layers: The hidden states that are read of each.
        drop_first: Whether each one's first token (CLS) is left out.
        means, deviations: Of R, G, B, that each is shown its pictures with.
        num_tokens: That each gives.
    """

    model_type = "several_vision_towers"
    base_config_key = "vision_config"

    towers: list[dict[str, Any]] | None = None
    layers: list[int] | None = None
    drop_first: list[bool] | None = None
    means: list[list[float]] | None = None
    deviations: list[list[float]] | None = None
    num_tokens: list[int] | None = None
    hidden_size: int = 0
    image_size: int = 0
    patch_size: int = 0


class SeveralTowers(PreTrainedModel):
    """Towers side by side; ``hidden_states`` holds one entry, the tokens of all, ``(B, N, D)``."""

    config_class = SeveralTowersConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: SeveralTowersConfig) -> None:
        super().__init__(config)
        described = [AutoConfig.for_model(**one) for one in config.towers or []]
        self.towers = nn.ModuleList(AutoModel.from_config(one) for one in described)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: Any = None,
        return_dict: bool | None = None,
        **_kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode pictures.

        Args:
            pixel_values: ``(B, 3, S, S)``, as the first tower's processor makes them.
            output_hidden_states: They are given in any case.
            return_dict: Always an output with names.
        """
        config = self.config
        tokens = []
        for number, tower in enumerate(self.towers):
            states = tower(self._as_seen_by(number, pixel_values), output_hidden_states=True)
            read = states.hidden_states[config.layers[number]]
            tokens.append(read[:, int(config.drop_first[number]) :])
        joined = torch.cat(tokens, dim=1)
        return BaseModelOutputWithPooling(
            last_hidden_state=joined, pooler_output=joined.mean(1), hidden_states=(joined,)
        )

    def _as_seen_by(self, number: int, pixel_values: Tensor) -> Tensor:
        """Resized and normalised for a tower."""
        config = self.config
        tower: Any = self.towers[number]
        size = tower.config.image_size
        if size != pixel_values.shape[-1]:
            pixel_values = F.interpolate(
                pixel_values, (size, size), mode="bicubic", antialias=True, align_corners=False
            )
        if (config.means[number], config.deviations[number]) == (
            config.means[0],
            config.deviations[0],
        ):
            return pixel_values

        def per_channel(values: Sequence[float]) -> Tensor:
            return pixel_values.new_tensor(values).view(3, 1, 1)

        plain = pixel_values * per_channel(config.deviations[0]) + per_channel(config.means[0])
        return (plain - per_channel(config.means[number])) / per_channel(config.deviations[number])


@torch.no_grad()
def join_towers(
    towers: Sequence[PreTrainedModel],
    image_processors: Sequence[Any],
    layers: Sequence[int],
    drop_first: Sequence[bool],
) -> SeveralTowers:
    """Join towers that exist; they are taken over, not copied.

    Args:
        towers: Of one width, each a transformer over a square picture.
        image_processors: Of each; the first is the joint one's.
        layers: The hidden states to be read of each.
        drop_first: Whether each one's first token (CLS) is left out.

    Raises:
        ValueError: The widths differ.
    """
    widths = [tower.config.hidden_size for tower in towers]
    if len(set(widths)) != 1:
        raise ValueError(f"towers of the widths {widths} cannot be joined: they must be equal")
    num_tokens = []
    for tower, layer, drops in zip(towers, layers, drop_first, strict=True):
        side = tower.config.image_size
        weight = next(tower.parameters())
        blank = torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device)
        states = tower(blank, output_hidden_states=True).hidden_states
        num_tokens.append(states[layer].shape[1] - int(drops))
    config = SeveralTowersConfig(
        towers=[tower.config.to_dict() for tower in towers],
        layers=list(layers),
        drop_first=list(drop_first),
        means=[list(one.image_mean) for one in image_processors],
        deviations=[list(one.image_std) for one in image_processors],
        num_tokens=num_tokens,
        hidden_size=widths[0],
        image_size=towers[0].config.image_size,
        patch_size=towers[0].config.patch_size,
    )
    with torch.device("meta"):  # the towers exist
        joined = SeveralTowers(config)
    joined.towers = nn.ModuleList(towers)
    return joined.eval()


AutoConfig.register(SeveralTowersConfig.model_type, SeveralTowersConfig)
AutoModel.register(SeveralTowersConfig, SeveralTowers)
