"""Language models that are mixtures themselves: their own balance loss, their routers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from mllm.model import build_llava
from mllm.prompts import ChatPrompts
from train.instruction_data import collate
from train.instruction_model import InstructionModel
from train.instruction_rows import InstructionSample, RowLimits, chat_row
from train.parts import set_trainable
from train.pictures import PixelValues
from train.recipe import (
    ConnectorTraining,
    InstructionRecipe,
    InstructionSource,
    LLMTraining,
    RouterPartTraining,
    Trainable,
)
from train.router_losses import router_settings

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "olmoe": (OlmoeConfig, {"num_experts": 4}),
    "qwen2_moe": (Qwen2MoeConfig, {**QWEN, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": (Qwen3MoeConfig, {**QWEN, "head_dim": 8}),
}


@pytest.fixture(params=CONFIGS)
def moe_llm(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    kind, extra = CONFIGS[request.param]
    torch.manual_seed(0)
    config = kind(vocab_size=len(tokenizer), **SMALL, **extra)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def moe_mllm(moe_llm: Any, tokenizer: Any, clip: Any, image_processor: Any) -> Any:
    return build_llava(moe_llm, tokenizer, clip.to_vision_model(), image_processor)


def recipe(**modes: str) -> InstructionRecipe:
    trainable = Trainable(
        connector=ConnectorTraining(mode="frozen"),
        llm=LLMTraining(mode=modes.get("llm", "frozen"), r=2),
        llm_router=RouterPartTraining(mode=modes.get("llm_router", "frozen")),
    )
    return InstructionRecipe(
        out="", data=[InstructionSource(name="easy_vqa")], trainable=trainable, llm_balance=0.5
    )


def text_batch(mllm: Any) -> dict[str, Tensor]:
    """Two rows of text, the second shorter: it ends in padding."""
    model, processor = mllm
    prompts = ChatPrompts(processor, model.config.image_seq_length)
    limits = RowLimits(prompts.image_token_id, lambda _: model.config.image_seq_length, 512)
    questions = ("what is the color of the circle?", "how many?")
    rows = [
        chat_row(InstructionSample((), ((question, "red"),)), prompts, limits)
        for question in questions
    ]
    return collate(rows, PixelValues([], processor.image_processor), pad_token_id=2)


def test_balance_loss_is_the_classs_own(moe_llm: Any, moe_mllm: Any) -> None:
    model, _ = moe_mllm
    batch = text_batch(moe_mllm)
    settings = recipe(llm="full", llm_router="full")
    parts = set_trainable(model, settings.trainable)
    wrapped = InstructionModel(model, router_settings(settings, model, parts)).eval()
    plain = InstructionModel(model).eval()
    added = wrapped(**batch)["loss"] - plain(**batch)["loss"]
    stock = moe_llm(
        input_ids=batch["input_ids"],
        attention_mask=(batch["branch_ids"] >= 0).long(),
        output_router_logits=True,
    )
    # Measured worst: 7.2e-7.
    torch.testing.assert_close(added / 0.5, stock.aux_loss, rtol=0, atol=1e-5)
    curves = wrapped.pop_curves()
    assert curves["llm_balance_loss"] == pytest.approx(stock.aux_loss.item(), abs=1e-5)
    assert sum(curves[f"router_load/llm_1/expert_{e}"] for e in range(4)) == pytest.approx(1)


def test_weight_is_the_configs_where_the_recipe_gives_none(moe_mllm: Any) -> None:
    model, _ = moe_mllm
    settings = recipe(llm="lora")
    settings.llm_balance = None
    parts = set_trainable(model, settings.trainable)
    expected = model.config.text_config.router_aux_loss_coef
    assert router_settings(settings, model, parts).llm_balance == expected > 0


@pytest.mark.parametrize("llm_router", ["frozen", "full"])
def test_routers_train_or_stay(moe_mllm: Any, llm_router: str) -> None:
    model, _ = moe_mllm
    settings = recipe(llm="lora", llm_router=llm_router)
    parts = set_trainable(model, settings.trainable)
    assert parts.num_parameters["llm_router"]["total"] == 2 * 4 * 32
    adapted = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    assert any(".experts." in name for name in adapted)
    assert any(".self_attn.q_proj." in name for name in adapted)
    InstructionModel(model, router_settings(settings, model, parts))(**text_batch(moe_mllm))[
        "loss"
    ].backward()
    gates = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(gates) == 2
    for gate in gates:
        assert (gate.grad is not None and bool(gate.grad.any())) == (llm_router == "full")


def test_mixture_that_only_reads_has_no_balance_loss(moe_mllm: Any) -> None:
    model, _ = moe_mllm
    settings = recipe()
    settings.trainable.connector.mode = "full"
    parts = set_trainable(model, settings.trainable)
    assert router_settings(settings, model, parts).llm_balance is None
