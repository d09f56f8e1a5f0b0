"""MME (Fu et al., arXiv 2306.13394): yes-or-no questions, two for each picture, 14 categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from mllm.scoring import (
    MME_COGNITION,
    MME_PERCEPTION,
    Interval,
    mme_answer,
    mme_intervals,
    mme_scores,
)
from mllm.tasks.base import Score, TaskItem
from mllm.tasks.files import FileTask
from mllm.tasks.records import Record
from mllm.tasks.rows import HubDataset
from vision_moe import InputError

_PICTURES = (".jpg", ".jpeg", ".png")


class MMETask(FileTask):
    """The release's folders: pictures and, for each, a text file of ``question<TAB>answer``."""

    name = "mme"
    title = "MME"
    needed_files: ClassVar[tuple[str, ...]] = ("existence", "count", "OCR", "code_reasoning")
    hub = HubDataset("lmms-lab-encoder/MME", "test")
    percent = False

    def read(self) -> Sequence[TaskItem]:
        items = []
        for category in MME_PERCEPTION + MME_COGNITION:
            folder = self.optional_file(category)
            for text_file in sorted(folder.rglob("*.txt")) if folder else ():
                items += self._pair(category, text_file)
        return items

    def _pair(self, category: str, text_file: Path) -> list[TaskItem]:
        # Beside the text, or in "images" beside "questions_answers_YN".
        folders = (text_file.parent, text_file.parent.parent / "images")
        names = [folder / (text_file.stem + suffix) for folder in folders for suffix in _PICTURES]
        picture = next((path for path in names if path.is_file()), names[0])
        key = picture.relative_to(Path(self.data or "")).as_posix()
        items = []
        try:
            lines = text_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{text_file}: cannot be read ({error})") from error
        for number, line in enumerate(filter(str.strip, lines), start=1):
            question, tab, answer = line.partition("\t")
            if not tab:
                raise InputError(f"{text_file}, line {number}: not a question, a tab and an answer")
            items.append(_item(f"{category}/{text_file.stem}/{number}", key, question, answer,
                               category, f"{text_file}, line {number}"))  # fmt: skip
        return items

    def read_row(self, record: Record) -> TaskItem:
        image, category = record.text("question_id"), record.text("category")
        question = record.text("question")
        # Both questions of a picture have one id; their texts tell them apart.
        return _item(f"{image}/{question}", image, question, record.text("answer"), category,
                     record.where)  # fmt: skip

    def group(self, item: TaskItem) -> str:
        return f"{item.category} {item.image_key}"

    def choices(self, item: TaskItem) -> tuple[str, ...]:
        return ("Yes", "No")

    def score(self, item: TaskItem, prediction: str) -> Score:
        read = mme_answer(prediction)
        return Score(float(read == item.answer), read)

    def metrics(self, items: Sequence[TaskItem], values: Sequence[float]) -> dict[str, float]:
        return mme_scores(*_arguments(items, values))

    def intervals(
        self, items: Sequence[TaskItem], values: Sequence[float], seed: int
    ) -> Mapping[str, Interval]:
        return mme_intervals(*_arguments(items, values), seed)


def _item(
    question_id: str, image: str, question: str, answer: str, category: str, where: str
) -> TaskItem:
    answer = answer.strip().lower()
    if answer not in ("yes", "no"):
        raise InputError(f"{where}: the answer is {answer!r:.60}, neither 'yes' nor 'no'")
    return TaskItem(question_id, image, question.strip(), answer, category)


def _arguments(
    items: Sequence[TaskItem], values: Sequence[float]
) -> tuple[list[str], list[str], list[bool]]:
    return (
        [item.category for item in items],
        [item.image_key or "" for item in items],
        [value == 1 for value in values],
    )
