"""Scenes: rendered image-text data with known factors, deterministic from a seed.

A few strong factors (background, colour and shape of the main object) dominate every picture; many
fine ones (place, size, texture, companions, lettering) vary within them.  It is the fine ones that
a contrastive model suppresses (CLIP-MoE, arXiv 2409.19291, section 1), so both kinds, and how many
values each has, are parameters of the :class:`SceneWorld`.
"""

from mllm.scenes.dataset import SPLITS, SceneSample, ScenesDataset
from mllm.scenes.pictures import render_pictures
from mllm.scenes.render import render
from mllm.scenes.text import (
    QUESTION_CATEGORIES,
    Question,
    coarse_caption,
    detailed_caption,
    questions,
)
from mllm.scenes.world import FACTORS, Scene, SceneObject, SceneWorld

__all__ = [
    "FACTORS",
    "QUESTION_CATEGORIES",
    "SPLITS",
    "Question",
    "Scene",
    "SceneObject",
    "SceneSample",
    "SceneWorld",
    "ScenesDataset",
    "coarse_caption",
    "detailed_caption",
    "questions",
    "render",
    "render_pictures",
]
