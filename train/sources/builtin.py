"""Instruction samples that need no file: rendered scenes and easy-VQA."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mllm.easy_vqa import EasyVQA, EasyVQAQuestion
from mllm.scenes import ScenesDataset
from train.instruction_rows import InstructionSample
from train.recipe import InstructionSource
from train.scene_world import scene_world
from train.sources.base import InstructionData, draw
from train.sources.pictures import PictureFile
from vision_moe import InputError

CAPTION_REQUEST = "Describe the picture."
_NUM_PROBES = 4


def _scenes(source: InstructionSource, seed: int) -> tuple[ScenesDataset, InstructionData]:
    if source.num_images is None:
        raise InputError(f"data source '{source.name}': 'num_images' is missing")
    world = scene_world(source.world, "data.world")
    try:
        scenes = ScenesDataset(
            world, source.split, source.num_images, seed, image_size=source.image_size
        )
    except ValueError as error:
        raise InputError(f"data source '{source.name}': {error}") from error
    # A few pictures stand for the renderer itself: when it changes, so do they.
    probes = hashlib.sha256()
    for index in range(min(_NUM_PROBES, len(scenes))):
        probes.update(scenes[index].image.tobytes())
    identity = f"{world!r} {source.split} {seed} {source.image_size} {probes.hexdigest()}"
    data = InstructionData(
        [],
        [lambda index=index: scenes[index].image for index in range(len(scenes))],  # type: ignore[misc]
        [f"scenes {identity} {index}" for index in range(len(scenes))],
    )
    return scenes, data


def scenes_captions(source: InstructionSource, seed: int) -> InstructionData:
    scenes, data = _scenes(source, seed)
    for index in range(len(scenes)):
        turns = ((CAPTION_REQUEST, scenes[index].detailed_caption),)
        data.samples.append(InstructionSample((index,), turns, source=f"scene {index}"))
    return data


def scenes_questions(source: InstructionSource, seed: int) -> InstructionData:
    scenes, data = _scenes(source, seed)
    for index in range(len(scenes)):
        turns = [(one.text, one.answer) for one in scenes[index].questions]
        turns = draw(turns, source.questions_per_image, [seed, index])
        data.samples.append(InstructionSample((index,), tuple(turns), source=f"scene {index}"))
    return data


def easy_vqa(source: InstructionSource, seed: int) -> InstructionData:
    dataset = EasyVQA(source.split, source.path)
    known = {question.category for question in dataset.questions}
    categories = known if source.categories is None else set(source.categories)
    if not categories or categories - known:
        raise InputError(
            f"data source 'easy_vqa': 'categories' is {sorted(categories)},"
            f" it must name some of {', '.join(sorted(known))}"
        )
    questions = [question for question in dataset.questions if question.category in categories]
    if source.balance_answers:
        questions = _balanced(questions, seed)
    turns_of: dict[int, list[tuple[str, str]]] = {}
    for question in questions:
        turns_of.setdefault(question.image_id, []).append((question.text, question.answer))
    image_ids = sorted(turns_of)
    if source.num_images is not None and source.num_images > len(image_ids):
        raise InputError(
            f"data source 'easy_vqa': {source.num_images} images wanted,"
            f" its split '{source.split}' has {len(image_ids)}"
        )
    image_ids = draw(image_ids, source.num_images, [seed])
    pictures = [PictureFile(str(dataset.image_path(image_id))) for image_id in image_ids]
    samples = [
        InstructionSample(
            (index,), tuple(draw(turns_of[image_id], source.questions_per_image, [seed, image_id]))
        )
        for index, image_id in enumerate(image_ids)
    ]
    return InstructionData(
        samples,
        [picture.open for picture in pictures],
        [picture.identity() for picture in pictures],
    )


def _balanced(questions: Sequence[EasyVQAQuestion], seed: int) -> list[EasyVQAQuestion]:
    """Questions thinned out until all answers to one wording are equally frequent.

    easy-VQA asks for a color that is not there five times as often as for the one that is: a model
    that never looks gets 85 % of such questions right, and hardly any gradient asks it to look.
    """
    counts = Counter((question.text, question.answer) for question in questions)
    rarest: dict[str, int] = {}
    for (text, _), count in counts.items():
        rarest[text] = min(count, rarest.get(text, count))
    lots = np.random.default_rng([seed, len(questions)]).random(len(questions))
    return [
        question
        for question, lot in zip(questions, lots, strict=True)
        if lot * counts[question.text, question.answer] < rarest[question.text]
    ]
