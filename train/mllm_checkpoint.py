"""What a training checkpoint of an MLLM holds of it, enough to export it from there.

    recipe.yaml             the resolved recipe
    trained.safetensors     the connector, and what else trains other than adapters
    adapters/llm/           adapters of a part, in peft's own format
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.checkpoints import WEIGHTS, on_cpu, reading
from train.config import save_resolved
from train.parts import TrainableParts
from train.recipe import InstructionRecipe
from vision_moe import InputError

RECIPE_FILE = "recipe.yaml"
_ADAPTERS, _ADAPTER_WEIGHTS = "adapters", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_CONNECTOR = "model.multi_modal_projector."

# Where the adapters of a part begin in the model.
_ROOTS = {
    "connector": _CONNECTOR,
    "llm": "model.language_model.",
    "vision": "model.vision_tower.",
    "router": "model.vision_tower.",
    "experts": "model.vision_tower.",
}


class MLLMContent:
    """The connector, whether it trains or not, and what else trains.

    Args:
        llava: A LLaVA model whose parts have been set.
        parts: Its parts.
        recipe: Of the run.
    """

    prefix = "llava."  # of the model's names inside InstructionModel

    def __init__(
        self, llava: nn.Module, parts: TrainableParts, recipe: InstructionRecipe
    ) -> None:
        self.parts = parts
        self.recipe = recipe
        self._names = [
            f"{self.prefix}{name}"
            for name, parameter in llava.named_parameters()
            if parameter.requires_grad or name.startswith(_CONNECTOR)
        ]

    def names(self) -> list[str]:
        return self._names

    def save(self, state: Mapping[str, Tensor], folder: Path) -> None:
        rest = {name.removeprefix(self.prefix): one for name, one in on_cpu(state).items()}
        for part, adapted in self.parts.adapters.items():
            names = {_peft_name(name, part): name for name in rest if _is_of_adapter(name, part)}
            target = folder / _ADAPTERS / part
            target.mkdir(parents=True, exist_ok=True)
            adapter = {short: rest.pop(name) for short, name in names.items()}
            save_file(adapter, target / _ADAPTER_WEIGHTS, {"format": "pt"})
            config = copy.deepcopy(adapted.peft_config[part])
            config.inference_mode = True
            config.save_pretrained(str(target))
        save_file(rest, folder / WEIGHTS, {"format": "pt"})
        save_resolved(self.recipe, folder / RECIPE_FILE)

    def read(self, folder: Path) -> dict[str, Tensor]:
        state = {
            f"{self.prefix}{name}": value
            for name, value in read_state(folder, list(self.parts.adapters)).items()
        }
        if absent := sorted(set(self.names()) - state.keys()):
            raise InputError(f"{folder}: a checkpoint of another model (it lacks '{absent[0]}')")
        return state


def read_state(folder: Path, adapted_parts: Sequence[str]) -> dict[str, Tensor]:
    """What a checkpoint holds, by name in the LLaVA model.

    Args:
        folder: The checkpoint.
        adapted_parts: Those that train by LoRA.

    Raises:
        InputError: A file is missing or damaged.
    """
    with reading(folder):
        state: dict[str, Tensor] = load_file(folder / WEIGHTS)
        for part in adapted_parts:
            adapter = load_file(folder / _ADAPTERS / part / _ADAPTER_WEIGHTS)
            state |= {_own_name(name, part): value for name, value in adapter.items()}
    return state


def _is_of_adapter(name: str, part: str) -> bool:
    return re.search(rf"\.lora_\w+\.{part}(\.|$)", name) is not None


def _peft_name(name: str, part: str) -> str:
    """``ROOT.x.lora_A.llm.weight`` -> ``base_model.model.x.lora_A.weight``"""
    inner = name.removeprefix(_ROOTS[part])
    return _PEFT_PREFIX + re.sub(rf"(\.lora_\w+)\.{part}(?=\.|$)", r"\1", inner)


def _own_name(name: str, part: str) -> str:
    inner = name.removeprefix(_PEFT_PREFIX)
    return _ROOTS[part] + re.sub(r"(\.lora_\w+?)(?=\.|$)", rf"\1.{part}", inner, count=1)
