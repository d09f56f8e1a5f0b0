"""What is said of a scene: captions as the web writes them, detailed ones, and questions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from mllm.scenes.world import PLACES, Scene, SceneObject, SceneWorld

QUESTION_CATEGORIES = (
    "shape", "color", "count", "position", "relation", "existence", "reading",
)  # fmt: skip
_NUMBERS = ("zero", "one", "two", "three", "four")
_COARSE_TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}", "{}", "one {}")


@dataclass(frozen=True)
class Question:
    """A question with its one-word (a place: two-word) answer, all in lower case."""

    text: str
    answer: str
    category: str


def coarse_caption(scene: Scene, rng: np.random.Generator, detail_probability: float = 0.1) -> str:
    """Name the main object, every other time with its color, and seldom anything else.

    Args:
        scene: What is described.
        rng: Decides what is told.
        detail_probability: How often each other fact is.
    """

    def told() -> bool:
        return bool(rng.random() < detail_probability)

    main = scene.main
    words = [main.color, main.shape] if rng.random() < 0.5 else [main.shape]
    if told() and main.texture != "solid":
        words.insert(0, main.texture)
    if told():
        words.insert(0, main.size)
    text = _COARSE_TEMPLATES[rng.integers(len(_COARSE_TEMPLATES))].format(" ".join(words))
    if told():
        text += f" at the {main.place}"
    if told():
        text += _background_phrase(scene)
    if told() and scene.companions:
        text += ", " + ", ".join(_companion_phrases(scene))
    if told() and scene.letter:
        text += f", letter {scene.letter.lower()}"
    return text


def detailed_caption(scene: Scene) -> str:
    """Tell every factor of the scene."""
    main = scene.main
    texture = "" if main.texture == "solid" else f"{main.texture} "
    text = f"a {main.size} {texture}{main.color} {main.shape} at the {main.place}"
    parts = [text + _background_phrase(scene), *_companion_phrases(scene)]
    if scene.letter:
        parts.append(f"letter {scene.letter.lower()}")
    return ", ".join(parts)


def _background_phrase(scene: Scene) -> str:
    return f" on {scene.background}" if scene.background != "plain" else ""


def _companion_phrases(scene: Scene) -> list[str]:
    """Companions grouped by kind; a lone one with its place."""
    kinds = Counter((c.color, c.shape) for c in scene.companions)
    phrases = []
    for (color, shape), count in kinds.items():
        if count > 1:
            phrases.append(f"{_NUMBERS[count]} {color} {_plural(shape)}")
        else:
            place = next(c.place for c in scene.companions if (c.color, c.shape) == (color, shape))
            phrases.append(f"a {color} {shape} at the {place}")
    return phrases


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def questions(scene: Scene, world: SceneWorld, rng: np.random.Generator) -> list[Question]:
    """Ask what the scene can answer without doubt, at least one question a category if possible."""
    shapes = Counter(obj.shape for obj in scene.objects)
    colors = Counter(obj.color for obj in scene.objects)
    asked: list[Question] = []
    for obj in scene.objects:
        if colors[obj.color] == 1:
            asked.append(Question(f"what shape is the {obj.color} object?", obj.shape, "shape"))
        if shapes[obj.shape] == 1:
            asked.append(Question(f"what color is the {obj.shape}?", obj.color, "color"))
            asked.append(Question(f"where is the {obj.shape}?", obj.place, "position"))
    asked.append(
        Question("how many objects are there?", _NUMBERS[len(scene.objects)], "count")
    )
    counted = str(rng.choice(sorted(shapes)))
    asked.append(
        Question(f"how many {_plural(counted)} are there?", _NUMBERS[shapes[counted]], "count")
    )
    asked += _relation_questions(scene, shapes, rng)
    asked += _existence_questions(scene, world, rng)
    if scene.letter:
        asked.append(Question("what letter is written?", scene.letter.lower(), "reading"))
    return asked


def _relation_questions(
    scene: Scene, shapes: Counter[str], rng: np.random.Generator
) -> list[Question]:
    """Yes-no questions on pairs of objects that each have a shape of their own."""
    unique = [obj for obj in scene.objects if shapes[obj.shape] == 1]
    asked = []
    for first, second in zip(unique, unique[1:], strict=False):
        relations = _relations(first, second)
        if not relations:
            continue
        truth, opposite = relations[rng.integers(len(relations))]
        answer = bool(rng.random() < 0.5)
        relation = truth if answer else opposite
        text = f"is the {first.shape} {relation} the {second.shape}?"
        asked.append(Question(text, "yes" if answer else "no", "relation"))
    return asked


def _relations(first: SceneObject, second: SceneObject) -> list[tuple[str, str]]:
    """``(true, false)`` relations of the grid cells of two objects."""
    (row, column), (other_row, other_column) = (
        divmod(PLACES.index(obj.place), 3) for obj in (first, second)
    )
    relations = []
    if column != other_column:
        pair = ("left of", "right of")
        relations.append(pair if column < other_column else pair[::-1])
    if row != other_row:
        pair = ("above", "below")
        relations.append(pair if row < other_row else pair[::-1])
    return relations


def _existence_questions(
    scene: Scene, world: SceneWorld, rng: np.random.Generator
) -> list[Question]:
    """One question on a kind that is there and one on a kind that is not, half of it right."""
    present = {(obj.color, obj.shape) for obj in scene.objects}
    there = sorted(present)[rng.integers(len(present))]
    # The absent kind shares a color or a shape with one that is there: neither alone answers. It is
    # none of the held-out kinds, of which training would otherwise say that they never exist.
    candidates = [(there[0], shape) for shape in world.shapes] + [
        (color, there[1]) for color in world.colors
    ]
    absent = [
        (color, shape)
        for color, shape in candidates
        if (color, shape) not in present and (shape, color) not in world.held_out_pairs
    ]
    asked = [Question(f"is there a {there[0]} {there[1]}?", "yes", "existence")]
    if absent:
        color, shape = absent[rng.integers(len(absent))]
        asked.append(Question(f"is there a {color} {shape}?", "no", "existence"))
    return asked
