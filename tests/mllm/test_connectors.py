"""Connectors: what they compute, and that models with them are saved, loaded and asked."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
)

from mllm.building import with_connector
from mllm.chat import ChatSession
from mllm.connectors import build_connector
from mllm.generation import Request, generate_answers
from mllm.model import build_llava, load_mllm, replace_vision_tower, save_mllm, upcycle_connector
from mllm.modeling import ConnectorLlavaForConditionalGeneration
from vision_moe import CLIPMoEConfig, CLIPMoEModel, InputError, moe_layers, save

# Settings, and how many of 16 tokens remain.
CONNECTORS: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"name": "linear"}, 16),
    "mlp": ({"name": "mlp3x_gelu"}, 16),
    "pixel_shuffle": ({"name": "pixel_shuffle", "factor": 2}, 4),
    "resampler": ({"name": "resampler", "num_queries": 5, "num_layers": 2}, 5),
    "moe_mlp": ({"name": "moe_mlp", "num_experts": 3, "top_k": 2}, 16),
    "groups": (
        {"name": "groups", "groups": [{"num_tokens": 4, "name": "linear"},
                                      {"num_tokens": 12, "name": "mlp2x_gelu"}]},
        16,
    ),
}  # fmt: skip


@pytest.fixture(params=CONNECTORS)
def connected(
    request: pytest.FixtureRequest,
    language_model: Any,
    tokenizer: Any,
    clip: Any,
    image_processor: Any,
) -> tuple[Any, Any]:
    settings, _ = CONNECTORS[request.param]
    tower = clip.to_vision_model()
    return build_llava(language_model, tokenizer, tower, image_processor, connector=settings)


@pytest.fixture
def image() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB")


def logits(model: Any, processor: Any, image: Image.Image) -> torch.Tensor:
    content = [{"type": "image"}, {"type": "text", "text": "is it red?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    with torch.no_grad():
        scores: torch.Tensor = model(
            **processor(images=image, text=text, return_tensors="pt")
        ).logits
    return scores


@pytest.mark.parametrize("name", CONNECTORS)
def test_connector_gives_its_tokens_and_trains(name: str) -> None:
    settings, num_tokens = CONNECTORS[name]
    torch.manual_seed(0)
    connector = build_connector(settings, width_in=24, width_out=40, num_tokens=16)
    out = connector(torch.randn(3, 16, 24))
    assert out.shape == (3, num_tokens, 40)
    assert connector.num_output_tokens == num_tokens
    out.square().sum().backward()
    assert all(p.grad is not None for p in connector.parameters())


def test_batch_without_pictures_gives_none() -> None:
    for settings, num_tokens in CONNECTORS.values():
        connector = build_connector(settings, 24, 40, 16)
        assert connector(torch.zeros(0, 16, 24)).shape == (0, num_tokens, 40)


def test_pixel_shuffle_joins_neighbouring_patches() -> None:
    connector = build_connector({"name": "pixel_shuffle"}, 3, 8, 16)
    tokens = torch.randn(1, 16, 3)
    first = torch.cat([tokens[0, place] for place in (0, 1, 4, 5)])  # a 2 x 2 square of 4 x 4
    hidden = F.gelu(connector.linear_1(connector.norm(first)))
    torch.testing.assert_close(connector(tokens)[0, 0], connector.linear_2(hidden))


def test_resampler_reads_all_tokens_from_their_places() -> None:
    torch.manual_seed(0)
    connector = build_connector({"name": "resampler", "num_queries": 2}, 24, 40, 16)
    tokens = torch.randn(1, 16, 24)
    out = connector(tokens)
    for place in range(16):
        changed = tokens.clone()
        changed[0, place] += 1
        assert not torch.equal(connector(changed), out)
    assert not torch.allclose(connector(tokens.flip(1)), out, atol=1e-4)


def test_group_of_tokens_has_a_connector_of_its_own() -> None:
    connector = build_connector(CONNECTORS["groups"][0], 24, 40, 16)
    tokens = torch.randn(1, 16, 24)
    out = connector(tokens)
    torch.testing.assert_close(out[:, :4], connector.connectors[0](tokens[:, :4]))
    torch.testing.assert_close(out[:, 4:], connector.connectors[1](tokens[:, 4:]))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"name": "mlp2x_relu"}, "no connector 'mlp2x_relu', only linear, mlpNx_gelu"),
        ({"name": "mlp"}, "no connector 'mlp'"),
        ({"name": "linear", "depth": 3}, "connector 'linear': .*'depth'"),
        ({"name": "pixel_shuffle", "factor": 3}, "16 tokens are no square .* factor 3"),
        (
            {"name": "groups", "groups": [{"num_tokens": 4}]},
            r"groups have \[4\] tokens, the tower 16",
        ),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        build_connector(settings, 24, 40, 16)


def test_model_survives_saving(connected: Any, tmp_path: Any, image: Image.Image) -> None:
    save_mllm(*connected, tmp_path / "mllm")
    again = load_mllm(tmp_path / "mllm")
    assert isinstance(again[0], ConnectorLlavaForConditionalGeneration)
    assert again[0].config.image_seq_length == connected[0].config.image_seq_length
    torch.testing.assert_close(logits(*again, image), logits(*connected, image), rtol=0, atol=0)


def test_model_answers_in_a_batch_and_in_a_chat(connected: Any, image: Image.Image) -> None:
    model, processor = connected
    (answer,) = generate_answers(
        model, processor, [Request(0, "is it red?")], lambda _: image, 4, progress=False
    )
    said = "".join(ChatSession(model, processor, image, max_new_tokens=4).ask("is it red?"))
    assert said.strip() == answer


def test_import_of_mllm_is_enough_for_the_auto_classes(
    language_model: Any, tokenizer: Any, clip: Any, image_processor: Any, tmp_path: Any
) -> None:
    tower = clip.to_vision_model()
    save_mllm(
        *build_llava(language_model, tokenizer, tower, image_processor,
                     connector={"name": "pixel_shuffle"}),
        tmp_path / "mllm",
    )  # fmt: skip
    load = f"""
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "mllm")!r})
processor = AutoProcessor.from_pretrained({str(tmp_path / "mllm")!r})
print(type(model).__name__, type(processor).__name__)
"""
    for script in (f"import mllm{load}", f"import transformers, mllm{load}"):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout == "ConnectorLlavaForConditionalGeneration LlavaProcessor\n", done.stderr


def test_import_of_mllm_alone_loads_no_transformers() -> None:
    script = "import sys, mllm; print('transformers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


def test_plain_connector_stays_stock(language_model, tokenizer, clip, image_processor, tmp_path):
    tower = clip.to_vision_model()
    built = build_llava(
        language_model, tokenizer, tower, image_processor, connector={"name": "mlp2x_gelu"}
    )
    assert type(built[0]) is LlavaForConditionalGeneration


def test_upcycled_connector_computes_what_the_mlp_did(mllm: Any, image: Image.Image) -> None:
    model, processor = mllm
    before = logits(model, processor, image)
    upcycled = upcycle_connector(model, num_experts=4, top_k=2)
    # Measured worst: 6e-6 of logits up to 9.
    torch.testing.assert_close(logits(upcycled, processor, image), before, rtol=0, atol=1e-4)
    assert list(moe_layers(upcycled.model.multi_modal_projector)) == ["moe"]


def test_upcycled_model_survives_saving(mllm: Any, tmp_path: Any, image: Image.Image) -> None:
    model, processor = mllm
    upcycled = with_connector(model, processor, {"name": "moe_mlp", "num_experts": 3})
    save_mllm(upcycled, processor, tmp_path / "mllm")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "mllm")
    again_processor = AutoProcessor.from_pretrained(tmp_path / "mllm")
    torch.testing.assert_close(
        logits(again, again_processor, image), logits(upcycled, processor, image), rtol=0, atol=0
    )


def test_other_connector_of_a_trained_model_is_refused(mllm: Any) -> None:
    with pytest.raises(InputError, match="mlp2x_gelu.*cannot become.*linear"):
        with_connector(*mllm, {"name": "linear"})


def larger_tower(folder: Any) -> Any:
    torch.manual_seed(1)
    config = CLIPMoEConfig(
        open_clip_config={
            "embed_dim": 16,
            "vision_cfg": {
                "image_size": 48, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8,
            },
            "text_cfg": {
                "context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1,
            },
        }
    )  # fmt: skip
    save(CLIPMoEModel(config), folder)
    return folder


def test_tower_with_more_tokens_fits_where_the_connector_takes_any(
    connected: Any, tmp_path: Any, image: Image.Image
) -> None:
    model, processor = connected
    folder = larger_tower(tmp_path / "larger")
    if not model.model.multi_modal_projector.any_length:
        with pytest.raises(InputError, match="gives 36 tokens, .* made for 16"):
            replace_vision_tower(model, folder, processor)
        return
    replace_vision_tower(model, folder, processor)
    assert model.config.image_seq_length == 36
    assert logits(model, processor, image).isfinite().all()
