"""Answers are true.

The checker below derives each one from the scene by itself, from the question's words.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mllm.scenes import (
    QUESTION_CATEGORIES,
    SPLITS,
    Scene,
    SceneObject,
    ScenesDataset,
    SceneWorld,
    questions,
)
from mllm.scenes.world import BACKGROUNDS, COLORS, LETTERS, PLACES, SHAPES

#: Every value there is.
WIDE = SceneWorld(shapes=SHAPES, colors=COLORS, backgrounds=BACKGROUNDS, letters=LETTERS)
NUMBERS = ["zero", "one", "two", "three", "four"]


def only(found: list[str]) -> str:
    assert len(set(found)) == 1 and found, "the question has no single answer"
    return found[0]


def shape_of(scene: Scene, color: str) -> str:
    found = [obj.shape for obj in scene.objects if obj.color == color]
    assert len(found) == 1
    return found[0]


def named(scene: Scene, shape: str) -> SceneObject:
    (found,) = (obj for obj in scene.objects if obj.shape == shape)
    return found


def yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def relation(scene: Scene, first: str, words: str, second: str) -> str:
    """By the objects' own centers, which the grid of places does not enter."""
    one, two = named(scene, first), named(scene, second)
    truth = {
        "left of": one.x < two.x, "right of": one.x > two.x,
        "above": one.y < two.y, "below": one.y > two.y,
    }  # fmt: skip
    return yes_no(truth[words])


def count(scene: Scene, plural: str) -> str:
    number = sum(plural in (obj.shape + "s", obj.shape + "es") for obj in scene.objects)
    return NUMBERS[number]


def is_there(scene: Scene, color: str, shape: str) -> str:
    return yes_no(any((o.color, o.shape) == (color, shape) for o in scene.objects))


ANSWERS: list[tuple[str, Callable[..., str]]] = [
    (r"what shape is the (\w+) object\?", shape_of),
    (r"what color is the (\w+)\?", lambda scene, shape: named(scene, shape).color),
    (r"where is the (\w+)\?", lambda scene, shape: named(scene, shape).place),
    (r"how many objects are there\?", lambda scene: NUMBERS[len(scene.objects)]),
    (r"how many (\w+) are there\?", count),
    (r"is the (\w+) (left of|right of|above|below) the (\w+)\?", relation),
    (r"is there a (\w+) (\w+)\?", is_there),
    (r"what letter is written\?", lambda scene: scene.letter.lower()),
]


def derived_answer(scene: Scene, text: str) -> str:
    for pattern, answer in ANSWERS:
        if match := re.fullmatch(pattern, text):
            return answer(scene, *match.groups())
    raise AssertionError(f"a question of no known form: {text}")


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, Any]]:
    samples = [ScenesDataset(WIDE, split, 150)[i] for split in SPLITS for i in range(150)]
    return [(sample.scene, question) for sample in samples for question in sample.questions]


def test_every_answer_follows_from_the_scene(asked: list[tuple[Scene, Any]]) -> None:
    for scene, question in asked:
        assert derived_answer(scene, question.text) == question.answer, (scene, question)


def test_places_match_the_thirds_of_the_picture(drawn: dict[str, list[Scene]]) -> None:
    for obj in (obj for scene in drawn["train"] for obj in scene.companions):
        row, column = min(2, int(obj.y * 3)), min(2, int(obj.x * 3))
        assert PLACES[3 * row + column] == obj.place


def test_every_category_is_asked(asked: list[tuple[Scene, Any]]) -> None:
    assert {question.category for _, question in asked} == set(QUESTION_CATEGORIES)


def test_answers_are_lower_case(asked: list[tuple[Scene, Any]]) -> None:
    assert all(question.answer == question.answer.lower() for _, question in asked)


def test_answers_are_one_word_or_a_place(asked: list[tuple[Scene, Any]]) -> None:
    for _, question in asked:
        assert " " not in question.answer or question.answer in PLACES


def test_existence_is_asked_once_with_either_answer(asked: list[tuple[Scene, Any]]) -> None:
    answers = Counter(q.answer for _, q in asked if q.category == "existence")
    assert answers["yes"] == answers["no"]


def test_relations_are_balanced(asked: list[tuple[Scene, Any]]) -> None:
    answers = Counter(q.answer for _, q in asked if q.category == "relation")
    assert 0.4 < answers["yes"] / answers.total() < 0.6  # some 400 fair coins


def test_no_question_denies_a_held_out_pair(asked: list[tuple[Scene, Any]]) -> None:
    for _, question in asked:
        if question.category == "existence" and question.answer == "no":
            _, _, _, color, shape = question.text.removesuffix("?").split()
            assert (shape, color) not in WIDE.held_out_pairs


def test_a_lone_kind_of_object_is_asked_no_false_question() -> None:
    world = SceneWorld(shapes=["circle"], colors=["red"], max_companions=0)
    scene = world.sample(np.random.default_rng(0))
    existence = [
        q for q in questions(scene, world, np.random.default_rng(0)) if q.category == "existence"
    ]
    assert [q.answer for q in existence] == ["yes"]
