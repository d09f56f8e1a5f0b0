"""What a CLIP knows of held-out scenes: retrieval, and which single facts it tells apart."""

from __future__ import annotations

import numpy as np
import torch

from mllm.scenes import FACTORS, Scene, ScenesDataset, detailed_caption
from train.attention import attention_kernel
from train.encoding import encode_all
from train.pairs import load_pairs, scenes_dataset
from train.recipe import ImageTextData
from vision_moe import CLIPMoEModel, retrieval_recall


def evaluate_clip(
    model: CLIPMoEModel, num_pairs: int = 1000, seed: int = 0, split: str = "test"
) -> dict[str, dict[str, float]]:
    """Evaluate on scenes that no training has shown, with their detailed captions.

    Args:
        model: Dense or MoE.
        num_pairs: Candidates of the retrieval.
        seed: Of the scenes.
        split: ``validation`` to choose by, ``test`` to report.

    Returns:
        ``retrieval``: recalls, 0 to 1, as of :func:`vision_moe.retrieval_recall`; ``factors``: for
        each factor the share of pictures that are closer to their caption than to the same caption
        with this factor changed; 0.5 is guessing.
    """
    data = ImageTextData(name="scenes", split=split, num_pairs=num_pairs, caption="detailed")  # type: ignore[arg-type]
    image, text = encode_all(model, load_pairs(data, model, seed), "fp32")
    unit_image = torch.nn.functional.normalize(image, dim=-1)
    own = (unit_image * torch.nn.functional.normalize(text, dim=-1)).sum(-1)      # (M,)
    scenes = scenes_dataset(data, model, seed)
    factors = {f: _factor_accuracy(model, scenes, f, unit_image, own, seed) for f in FACTORS}
    return {"retrieval": retrieval_recall(image, text), "factors": factors}


@torch.inference_mode()
def _factor_accuracy(
    model: CLIPMoEModel,
    scenes: ScenesDataset,
    factor: str,
    unit_image: torch.Tensor,
    own: torch.Tensor,
    seed: int,
) -> float:
    rng = np.random.default_rng([seed, FACTORS.index(factor)])
    numbers, captions = [], []
    for number in range(len(scenes)):
        scene = scenes[number].scene
        changed: Scene | None = scenes.world.hard_negative(scene, factor, rng)
        if changed is not None and detailed_caption(changed) != detailed_caption(scene):
            numbers.append(number)
            captions.append(detailed_caption(changed))
    if not captions:
        return float("nan")
    tokens = model.tokenizer(captions).to(model.device)
    with attention_kernel(model.device, tokens.shape[1]):
        text = model.encode_text_by_length(tokens).float().cpu()
    unit_text = torch.nn.functional.normalize(text, dim=-1)
    wrong = (unit_image[numbers] * unit_text).sum(-1)
    return float((own[numbers] > wrong).float().mean())
