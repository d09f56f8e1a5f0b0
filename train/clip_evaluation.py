"""What a CLIP knows of held-out scenes: retrieval, which single facts it tells apart, and whether
it still names the main object.

M scenes, N of them with a factor, C classes, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mllm.scenes import FACTORS, detailed_caption
from train.attention import attention_kernel
from train.encoding import encode_all
from train.pairs import Pairs, load_pairs, scenes_dataset
from train.recipe import ImageTextData
from vision_moe import CLIPMoEModel, retrieval_ranks, retrieval_recall

#: The retrievals of :func:`measure_clip`, and naming the main object.
I2T, T2I, ZERO_SHOT = "i2t", "t2i", "zero_shot"
_PROMPTS = ("a {}", "a photo of a {}", "a picture of a {}")


@dataclass(frozen=True)
class HeldOutScenes:
    """Scenes that no training has shown, with what a CLIP is asked about them.

    Attributes:
        pairs: Pictures and detailed captions.
        negatives: For each factor the scenes ``(N,)`` that have it, and the tokens ``(N, L)`` of
            their captions with this factor changed.
        class_tokens: ``(prompts, C, L)``, the names of the main objects that there may be.
        classes: ``(M,)`` the class of each scene's main object.
    """

    pairs: Pairs
    negatives: dict[str, tuple[np.ndarray, Tensor]]
    class_tokens: Tensor
    classes: Tensor


@dataclass(frozen=True)
class MeasuredClip:
    """Features ``(M, D)``, and for each kind of question whether the model is right, bool."""

    image: Tensor
    text: Tensor
    hits: dict[str, np.ndarray]


def held_out_scenes(
    model: CLIPMoEModel,
    num_pairs: int,
    seed: int,
    split: Literal["validation", "test", "compositional"] = "test",
) -> HeldOutScenes:
    """Draw scenes for models with this one's preprocessing and tokenizer."""
    data = ImageTextData(name="scenes", split=split, num_pairs=num_pairs, caption="detailed")
    dataset = scenes_dataset(data, model, seed)
    scenes = [dataset[number].scene for number in range(num_pairs)]
    negatives = {}
    for number, factor in enumerate(FACTORS):
        rng = np.random.default_rng([seed, number])
        changed = [dataset.world.hard_negative(scene, factor, rng) for scene in scenes]
        captions = {
            index: detailed_caption(other)
            for index, (scene, other) in enumerate(zip(scenes, changed, strict=True))
            if other is not None and detailed_caption(other) != detailed_caption(scene)
        }
        if captions:
            tokens = model.tokenizer(list(captions.values()))
            negatives[factor] = np.array(list(captions)), tokens
    world = dataset.world
    pairs_of_class = list(product(world.shapes, world.colors))
    names = [f"{color} {shape}" for shape, color in pairs_of_class]
    return HeldOutScenes(
        load_pairs(data, model, seed),
        negatives,
        torch.stack([model.tokenizer([one.format(name) for name in names]) for one in _PROMPTS]),
        torch.tensor([pairs_of_class.index((s.main.shape, s.main.color)) for s in scenes]),
    )


@torch.inference_mode()
def measure_clip(model: CLIPMoEModel, scenes: HeldOutScenes) -> MeasuredClip:
    """Ask a model everything: see :class:`HeldOutScenes`.

    Its ``hits`` are :data:`I2T` and :data:`T2I` ``(M,)``, rank 1 among all; each factor ``(N,)``,
    the picture is closer to its caption than to the same with this factor changed, 0.5 is guessing;
    and :data:`ZERO_SHOT` ``(M,)``.
    """
    image, text = encode_all(model, scenes.pairs, "fp32")
    ranks = retrieval_ranks(image, text)
    unit = torch.nn.functional.normalize(image, dim=-1)
    own = (unit * torch.nn.functional.normalize(text, dim=-1)).sum(-1)             # (M,)
    hits = {I2T: (ranks.i2t == 0).numpy(), T2I: (ranks.t2i == 0).numpy()}
    for factor, (numbers, tokens) in scenes.negatives.items():
        wrong = (unit[numbers] * _unit_text(model, tokens)).sum(-1)                # (N,)
        hits[factor] = (own[numbers] > wrong).numpy()
    classes = torch.stack([_unit_text(model, tokens) for tokens in scenes.class_tokens]).mean(0)
    named = (unit @ torch.nn.functional.normalize(classes, dim=-1).T).argmax(-1)   # (M,)
    hits[ZERO_SHOT] = (named == scenes.classes).numpy()
    return MeasuredClip(image, text, hits)


def _unit_text(model: CLIPMoEModel, tokens: Tensor) -> Tensor:
    with attention_kernel(model.device, tokens.shape[1]):
        text = model.encode_text_by_length(tokens.to(model.device)).float().cpu()
    return torch.nn.functional.normalize(text, dim=-1)


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
    measured = measure_clip(model, held_out_scenes(model, num_pairs, seed, split))  # type: ignore[arg-type]
    nothing = np.array([float("nan")])
    return {
        "retrieval": retrieval_recall(measured.image, measured.text),
        "factors": {f: float(measured.hits.get(f, nothing).mean()) for f in FACTORS},
    }
