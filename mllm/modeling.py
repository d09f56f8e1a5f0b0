"""LLaVA with a connector that the stock class does not have, registered with transformers.

With the stock connector an MLLM is an ordinary ``LlavaForConditionalGeneration``; with any other it
is the same model with that one module exchanged, of ``model_type`` ``mllm_llava``.

This file imports only :mod:`mllm.connectors`: it is loaded as soon as transformers is.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
)

from mllm.connectors import build_connector


class ConnectorLlavaConfig(LlavaConfig):
    """LLaVA's configuration and ``connector``: its name, its options, the tower's tokens."""

    model_type = "mllm_llava"

    connector: dict[str, Any] | None = None
    num_tower_tokens: int = 576


class ConnectorLlavaModel(LlavaModel):
    config_class = ConnectorLlavaConfig

    def __init__(self, config: ConnectorLlavaConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector = connector_of(config)


class ConnectorLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """:class:`LlavaForConditionalGeneration` with any connector of :mod:`mllm.connectors`."""

    config_class = ConnectorLlavaConfig

    def __init__(self, config: ConnectorLlavaConfig) -> None:
        super().__init__(config)
        self.model = ConnectorLlavaModel(config)
        self.post_init()


def connector_of(config: ConnectorLlavaConfig) -> Any:
    """The connector that a configuration describes, with new weights."""
    layers: Any = config.vision_feature_layer
    vision: Any = config.vision_config
    text: Any = config.text_config
    width = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
    settings = config.connector or {}
    return build_connector(settings, width, text.hidden_size, config.num_tower_tokens)


AutoConfig.register(ConnectorLlavaConfig.model_type, ConnectorLlavaConfig)
AutoModelForImageTextToText.register(ConnectorLlavaConfig, ConnectorLlavaForConditionalGeneration)
AutoProcessor.register(ConnectorLlavaConfig, LlavaProcessor)
