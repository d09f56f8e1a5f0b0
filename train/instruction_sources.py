"""Where instruction samples come from: rendered scenes, easy-VQA, LLaVA's JSON.

Each source gives samples, opens its pictures and names them, so that what is computed of a picture
can be cached.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.easy_vqa import EasyVQA, EasyVQAQuestion
from mllm.scenes import ScenesDataset
from train.instruction_rows import InstructionSample
from train.recipe import InstructionSource
from train.scene_world import scene_world
from vision_moe import InputError, open_image, sha256_file

CAPTION_REQUEST = "Describe the picture."
_NUM_PROBES = 4


@dataclass(frozen=True)
class InstructionData:
    """Samples, and the pictures that their ``image_keys`` number.

    Attributes:
        samples: Keys count the distinct pictures from 0.
        open_images: One function for each picture.
        image_identities: One string for each picture; equal strings are equal pictures.
    """

    samples: list[InstructionSample]
    open_images: list[Callable[[], Image.Image]]
    image_identities: list[str]


def load_sources(sources: Sequence[InstructionSource], seed: int) -> InstructionData:
    """Read every source of a recipe and join them.

    Args:
        sources: As in the recipe.
        seed: Of scenes, and of what is drawn from larger sources.

    Raises:
        InputError: A file is missing or a record is wrong; the message names both.
    """
    data = InstructionData([], [], [])
    for source in sources:
        part = _READERS[source.name](source, seed)
        offset = len(data.open_images)
        data.samples.extend(
            dataclasses.replace(one, image_keys=tuple(offset + key for key in one.image_keys))
            for one in part.samples
        )
        data.open_images.extend(part.open_images)
        data.image_identities.extend(part.image_identities)
    return data


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


def _scenes_captions(source: InstructionSource, seed: int) -> InstructionData:
    scenes, data = _scenes(source, seed)
    for index in range(len(scenes)):
        turns = ((CAPTION_REQUEST, scenes[index].detailed_caption),)
        data.samples.append(InstructionSample((index,), turns))
    return data


def _scenes_questions(source: InstructionSource, seed: int) -> InstructionData:
    scenes, data = _scenes(source, seed)
    for index in range(len(scenes)):
        turns = [(one.text, one.answer) for one in scenes[index].questions]
        turns = _draw(turns, source.questions_per_image, [seed, index])
        data.samples.append(InstructionSample((index,), tuple(turns)))
    return data


def _easy_vqa(source: InstructionSource, seed: int) -> InstructionData:
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
    image_ids = _draw(image_ids, source.num_images, [seed])
    paths = [dataset.image_path(image_id) for image_id in image_ids]
    samples = [
        InstructionSample(
            (index,), tuple(_draw(turns_of[image_id], source.questions_per_image, [seed, image_id]))
        )
        for index, image_id in enumerate(image_ids)
    ]
    return _with_files(samples, paths)


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


def _llava_json(source: InstructionSource, seed: int) -> InstructionData:
    """LLaVA's format: a list of ``{"id", "image", "conversations": [{"from", "value"}]}``."""
    if source.path is None:
        raise InputError("data source 'llava_json': 'path' is missing")
    file = Path(source.path)
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(records, list) or not records:
        raise InputError(f"{file}: holds no list of records")
    folder = Path(source.image_folder) if source.image_folder else file.parent
    chosen = _draw(range(len(records)), source.num_images, [seed])
    paths: dict[Path, int] = {}
    samples = []
    for number in chosen:
        record = records[number]
        where = f"{file}, record {number}"
        if isinstance(record, dict) and "id" in record:
            where += f" (id {record['id']!r})"
        image, turns = _parse_llava(record, where)
        path = folder / image
        if not path.is_file():
            raise InputError(f"{where}: there is no picture '{path}'")
        samples.append(InstructionSample((paths.setdefault(path, len(paths)),), turns, True))
    return _with_files(samples, list(paths))


def _parse_llava(record: Any, where: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    if not isinstance(record, dict):
        raise InputError(f"{where}: is no object")
    image, conversation = record.get("image"), record.get("conversations")
    if not isinstance(image, str):
        raise InputError(f"{where}: 'image' must be one path")
    if not isinstance(conversation, list) or not conversation or len(conversation) % 2:
        raise InputError(f"{where}: 'conversations' must alternate between human and gpt")
    texts = []
    for number, message in enumerate(conversation):
        speaker = ("human", "gpt")[number % 2]
        if not isinstance(message, dict) or message.get("from") != speaker:
            raise InputError(f"{where}: message {number} must be from '{speaker}'")
        if not isinstance(message.get("value"), str):
            raise InputError(f"{where}: message {number} has no text as its 'value'")
        texts.append(message["value"])
    num_placeholders = sum(text.count("<image>") for text in texts)
    if num_placeholders != 1 or "<image>" not in texts[0]:
        raise InputError(
            f"{where}: {num_placeholders} <image> placeholders but 1 image; there must be one,"
            " in the first message"
        )
    texts[0] = texts[0].replace("<image>", "").strip()
    return image, tuple(zip(texts[::2], texts[1::2], strict=True))


def _with_files(samples: list[InstructionSample], paths: Sequence[Path]) -> InstructionData:
    return InstructionData(
        samples,
        [lambda path=path: open_image(path) for path in paths],  # type: ignore[misc]
        [f"file {sha256_file(path)}" for path in paths],
    )


def _draw(items: Sequence[Any], count: int | None, seed: Sequence[int]) -> list[Any]:
    """``count`` of the items in an order of their own, or all of them in theirs."""
    if count is None or count >= len(items):
        return list(items)
    chosen = np.random.default_rng(seed).choice(len(items), size=count, replace=False)
    return [items[index] for index in chosen]


_READERS: dict[str, Callable[[InstructionSource, int], InstructionData]] = {
    "scenes_captions": _scenes_captions,
    "scenes_questions": _scenes_questions,
    "easy_vqa": _easy_vqa,
    "llava_json": _llava_json,
}
