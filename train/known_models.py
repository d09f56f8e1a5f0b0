"""Architectures of the models that the shipped recipes name, for plans without the model hub.

The numbers of their published ``config.json``; what trains is what the hub or a folder gives.
"""

from typing import Any

import open_clip
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from vision_moe import CLIPMoEVisionConfig


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **rest: Any
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **rest,
    )


_VICUNA: dict[str, Any] = {"vocab_size": 32_000, "max_position_embeddings": 4096}
_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_QWEN: dict[str, Any] = {
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}


def known_llm(name: str) -> PreTrainedConfig | None:
    """The language model of a hub name."""
    match name:
        case "lmsys/vicuna-7b-v1.5":
            return _llama(4096, 11_008, 32, 32, 32, **_VICUNA)
        case "lmsys/vicuna-13b-v1.5":
            return _llama(5120, 13_824, 40, 40, 40, **_VICUNA)
        case "HuggingFaceTB/SmolLM2-135M-Instruct" | "embedded":
            return _llama(576, 1536, 30, 9, 3, **_SMOLLM2)
        case "HuggingFaceTB/SmolLM2-360M-Instruct":
            return _llama(960, 2560, 32, 15, 5, **_SMOLLM2)
        case "HuggingFaceTB/SmolLM2-1.7B-Instruct":
            return _llama(2048, 8192, 24, 32, 32, **_SMOLLM2)
        case "Qwen/Qwen2.5-0.5B-Instruct":
            return Qwen2Config(
                hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                num_attention_heads=14, num_key_value_heads=2, **_QWEN,
            )  # fmt: skip
        case "Qwen/Qwen2.5-1.5B-Instruct":
            return Qwen2Config(
                hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                num_attention_heads=12, num_key_value_heads=2, **_QWEN,
            )  # fmt: skip
        case "microsoft/Phi-3.5-mini-instruct":
            return Phi3Config(
                vocab_size=32_064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=131_072,
                pad_token_id=32_000,
            )  # fmt: skip
    return None


def known_tower(name: str) -> PreTrainedConfig | None:
    """The vision tower of a hub name, or of the folder that the recipes call the CLIP-MoE."""
    match name:
        case "openai/clip-vit-large-patch14-336":
            return CLIPVisionConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768,
            )  # fmt: skip
        case "runs/clip_moe_vit_l_14_336":
            description: Any = open_clip.get_model_config("ViT-L-14-336")
            kept = {key: description[key] for key in ("embed_dim", "vision_cfg")}
            moe = {"num_experts": 4, "top_k": 2, "vision_layers": list(range(24))}
            return CLIPMoEVisionConfig(open_clip_config={**kept, "quick_gelu": True}, moe=moe)
    return None
