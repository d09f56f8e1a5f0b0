"""easy-VQA (MIT): 64x64 pictures of one shape, with questions on shape, color and yes or no.

The PyPI package ``easy-vqa`` ships the data; this reads its files.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from vision_moe import InputError

SPLITS = ("train", "test")
_SHAPES = frozenset({"circle", "rectangle", "triangle"})


@dataclass(frozen=True)
class EasyVQAQuestion:
    """A question; ``category`` is ``shape``, ``color`` or ``yes-no``."""

    text: str
    answer: str
    image_id: int

    @property
    def category(self) -> str:
        if self.answer in ("yes", "no"):
            return "yes-no"
        return "shape" if self.answer in _SHAPES else "color"


class EasyVQA:
    """One split: ``questions`` in the order of the file, ``image_path`` of a picture's number.

    Args:
        split: ``train`` or ``test``.
        root: A folder with ``train`` and ``test``; the installed package's by default.
    """

    def __init__(self, split: str, root: str | Path | None = None) -> None:
        if split not in SPLITS:
            raise InputError(f"easy-VQA has no split '{split}', only {' and '.join(SPLITS)}")
        self._folder = (_package_data() if root is None else Path(root)) / split
        self.questions = _read_questions(self._folder / "questions.json")

    def image_path(self, image_id: int) -> Path:
        return self._folder / "images" / f"{image_id}.png"


def _package_data() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the package easy-vqa is not installed: pip install easy-vqa")
    return Path(spec.submodule_search_locations[0]) / "data"


def _read_questions(path: Path) -> list[EasyVQAQuestion]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"easy-VQA: there is no file '{path}'") from None
    except ValueError as error:
        raise InputError(f"easy-VQA: '{path}' is not JSON ({error})") from error
    questions = []
    for index, record in enumerate(records):
        match record:
            case [str(text), str(answer), int(image_id)]:
                questions.append(EasyVQAQuestion(text, answer, image_id))
            case _:
                raise InputError(
                    f"easy-VQA: '{path}', record {index}: not [question, answer, image number]"
                )
    return questions
