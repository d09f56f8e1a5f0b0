"""What an MLLM could find in a tower's tokens: a scene's facts, read by linear classifiers.

N scenes, L image tokens (CLS first), D tower width.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

from mllm.scenes import Scene
from train.pairs import load_pairs, scenes_dataset
from train.recipe import ImageTextData
from vision_moe import CLIPMoEModel
from vision_moe.towers import vision_states

_BATCH = 256
#: Of the ridge, on standardised features.
_STRENGTH = 300.0


def read_facts(
    model: CLIPMoEModel, split: str, num_training: int, num_scenes: int, seed: int
) -> dict[str, dict[str, float]]:
    """The share of held-out scenes whose fact is read rightly, 0 to 1.

    Args:
        model: Dense or MoE; its last block's tokens are read, as by the recipe ``evidence_mllm``.
        split: Of the scenes that are held out.
        num_training: Scenes of the training split that the classifiers learn from.
        num_scenes: Held out.
        seed: Of both.

    Returns:
        For each fact ``cls``, from that token, and ``patches``, from all others side by side. A
        scene without companions or letter is left out of what is asked of them.
    """
    learnt, known = _tokens_and_scenes(model, "train", num_training, seed)
    seen, asked = _tokens_and_scenes(model, split, num_scenes, seed)
    accuracy: dict[str, dict[str, float]] = {}
    for tokens in ("cls", "patches"):
        fitted = StandardScaler().fit(_select(learnt, tokens))
        ours = fitted.transform(_select(learnt, tokens))
        theirs = fitted.transform(_select(seen, tokens))
        for fact in facts_of(known[0]):
            train_rows, train_values = _told(known, fact)
            test_rows, test_values = _told(asked, fact)
            if not len(test_rows) or len(set(train_values)) < 2:
                continue
            reader = RidgeClassifier(alpha=_STRENGTH).fit(ours[train_rows], train_values)
            right = reader.predict(theirs[test_rows]) == test_values
            accuracy.setdefault(fact, {})[tokens] = float(right.mean())
    return accuracy


def facts_of(scene: Scene) -> dict[str, str | None]:
    """What there is to read; ``None`` where the scene has no such thing."""
    first = scene.companions[0] if scene.companions else None
    return {
        "shape": scene.main.shape,
        "color": scene.main.color,
        "background": scene.background,
        "size": scene.main.size,
        "texture": scene.main.texture,
        "place": scene.main.place,
        "companion shape": first.shape if first else None,
        "companion color": first.color if first else None,
        "companion place": first.place if first else None,
        "count": str(len(scene.companions)),
        "letter": scene.letter,
    }


def _told(scenes: list[Scene], fact: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the scenes that have it, and its values there."""
    values = [facts_of(scene)[fact] for scene in scenes]
    rows = [row for row, value in enumerate(values) if value is not None]
    return np.array(rows, np.int64), np.array([values[row] for row in rows])


def _select(states: np.ndarray, tokens: str) -> np.ndarray:
    """``(N, L, D)`` -> ``(N, D)`` or ``(N, (L - 1) D)``."""
    return states[:, 0] if tokens == "cls" else states[:, 1:].reshape(len(states), -1)


@torch.inference_mode()
def _tokens_and_scenes(
    model: CLIPMoEModel, split: str, num_scenes: int, seed: int
) -> tuple[np.ndarray, list[Scene]]:
    data = ImageTextData(name="scenes", split=split, num_pairs=num_scenes)  # type: ignore[arg-type]
    dataset = scenes_dataset(data, model, seed)
    pairs = load_pairs(data, model, seed)
    batches = []
    for start in range(0, num_scenes, _BATCH):
        pixels, _ = pairs.read(np.arange(start, min(num_scenes, start + _BATCH)))
        states = vision_states(model.visual, pixels.to(model.device))
        batches.append(states.hidden_states[-1].float().cpu())
    return torch.cat(batches).numpy(), [dataset[index].scene for index in range(num_scenes)]
