"""A language model's linear layers in four bits (QLoRA, arXiv 2305.14314), and back.

NF4 with double quantisation, by bitsandbytes, on a CPU as well. Embeddings, norms and the head stay
as they are, and so do tower and connector: at their borders activations are cast.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def quantize_nf4(language_model: PreTrainedModel, device: torch.device) -> None:
    """Replace the linear layers of a language model without its head, in place, one by one.

    Args:
        language_model: On any device.
        device: Where the quantised layers go.
    """
    bnb = _bitsandbytes()
    for name, layer in list(language_model.named_modules()):
        if type(layer) is nn.Linear:
            small = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                quant_type="nf4",
                device="meta",
            )
            small.weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            small.bias = layer.bias
            _replace(language_model, name, small.to(device))
    language_model.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks for it


@torch.no_grad()
def merge_dequantized(language_model: nn.Module, part: str) -> None:
    """Replace four-bit layers by ordinary ones in fp32, adapters added, in place.

    peft would merge into the four bits and round the adapters away.

    Args:
        language_model: Without its head.
        part: Name of the adapters.
    """
    bnb = _bitsandbytes()
    from peft.tuners.lora import LoraLayer

    done: list[str] = []
    for name, layer in list(language_model.named_modules()):
        if any(name.startswith(f"{one}.") for one in done):
            continue
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        if not isinstance(base, bnb.nn.Linear4bit):
            continue
        weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
        if isinstance(layer, LoraLayer):
            adapter: Any = layer
            weight += adapter.get_delta_weight(part).to(weight)
        plain = nn.Linear(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = base.bias
        _replace(language_model, name, plain)
        done.append(name)
    language_model.is_loaded_in_4bit = False  # type: ignore[assignment]


def num_elements(parameter: torch.Tensor) -> int:
    """Of the weight that a parameter stands for: four-bit ones are packed."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def _bitsandbytes() -> Any:
    # It warns of an optional package that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
