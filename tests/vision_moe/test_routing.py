import threading

import pytest
import torch
from torch import Tensor

import vision_moe
from vision_moe import CLIPMoEModel


def test_record_holds_logits_of_every_layer(
    moe_clip: CLIPMoEModel, pixel_values: Tensor, tokens: Tensor
) -> None:
    with vision_moe.record_routing(moe_clip) as record:
        moe_clip.encode_image(pixel_values)
        moe_clip.encode_text(tokens)
    shapes = {name: tuple(logits.shape) for name, logits in record.router_logits.items()}
    vision = {f"visual.transformer.resblocks.{i}.mlp": (3, 17, 4) for i in range(3)}
    text = {f"text.transformer.resblocks.{i}.mlp": (3, 16, 4) for i in range(2)}
    assert shapes == vision | text


def test_recorded_logits_carry_gradients_to_the_router(
    moe_clip: CLIPMoEModel, pixel_values: Tensor
) -> None:
    with vision_moe.record_routing(moe_clip) as record:
        moe_clip.encode_image(pixel_values)
    vision_moe.load_balancing_loss(record.router_logits.values()).backward()
    gradient = moe_clip.visual.transformer.resblocks[2].mlp.router.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_expert_load_sums_to_one(moe_clip: CLIPMoEModel, pixel_values: Tensor) -> None:
    with vision_moe.record_routing(moe_clip) as record:
        moe_clip.encode_image(pixel_values)
    for load in record.expert_load().values():
        assert load.sum().item() == pytest.approx(1.0)


def test_no_hook_is_left_behind(moe_clip: CLIPMoEModel) -> None:
    with vision_moe.record_routing(moe_clip):
        pass
    layers = vision_moe.moe_layers(moe_clip).values()
    assert not any(layer.router._forward_hooks for layer in layers)


def test_record_leaves_out_other_threads(moe_clip: CLIPMoEModel, pixel_values: Tensor) -> None:
    with vision_moe.record_routing(moe_clip) as record:
        thread = threading.Thread(target=moe_clip.encode_image, args=(pixel_values,))
        thread.start()
        thread.join()
    assert not record.router_logits


def test_forced_expert_zero_equals_base(
    dense_clip: CLIPMoEModel, perturb, pixel_values: Tensor, tokens: Tensor
) -> None:
    image, text = dense_clip.encode_image(pixel_values), dense_clip.encode_text(tokens)
    base = vision_moe.ffn_state_dict(dense_clip)
    moe = vision_moe.upcycle(dense_clip, [base, perturb(base, 1)], top_k=2)
    with vision_moe.force_expert(moe, 0):
        assert torch.equal(moe.encode_image(pixel_values), image)
        assert torch.equal(moe.encode_text(tokens), text)


def test_forced_experts_differ(moe_clip: CLIPMoEModel, pixel_values: Tensor) -> None:
    features = []
    for expert in range(4):
        with vision_moe.force_expert(moe_clip, expert):
            features.append(moe_clip.encode_image(pixel_values))
    assert not torch.allclose(features[0], features[3], atol=1e-3)


def test_uniform_routing_is_the_mean_of_the_experts() -> None:
    experts = [torch.nn.Linear(4, 4) for _ in range(2)]
    moe = vision_moe.MoEFeedForward(experts, 4, 1)
    x = torch.randn(5, 4)
    with vision_moe.uniform_routing(moe):
        torch.testing.assert_close(moe(x), (experts[0](x) + experts[1](x)) / 2)


def test_control_ends_with_its_block(moe_clip: CLIPMoEModel, pixel_values: Tensor) -> None:
    before = moe_clip.encode_image(pixel_values)
    with vision_moe.uniform_routing(moe_clip), vision_moe.force_expert(moe_clip, 1):
        pass
    assert torch.equal(moe_clip.encode_image(pixel_values), before)


def test_unknown_expert_is_refused(moe_clip: CLIPMoEModel) -> None:
    with (
        pytest.raises(ValueError, match="expert 4 of 4"),
        vision_moe.force_expert(moe_clip, 4),
    ):
        pass
