"""The quickstart's report, from a folder with a tiny CLIP-MoE and made-up logs and scores."""

import html
import json
import random
import re
import shutil
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mllm.easy_vqa import EasyVQA
from mllm.evaluate import Evaluation, Prediction
from mllm.scenes.world import FACTORS
from mllm.tasks import get_task
from train.plots import running_mean
from train.report import (
    NUM_EXAMPLES,
    NUM_MISTAKES,
    WORDS_ALONE,
    draw_examples,
    duration,
    write_report,
)
from vision_moe import InputError

HOSTILE = '<script>alert("x")</script> & $a_b$'
REPORT = {
    "seed": 0,
    "versions": {"python": "3.11.2", "torch": "2.14.0", "mllm-moe": "0.1.0"},
    "hardware": {"processor": HOSTILE, "num_cores": 2, "memory_gib": 15.6, "gpu": "none"},
    "seconds": {
        "base_clip": 262.0, "upcycle": 318.5, "pretrain": 96.0, "finetune": 301.0, "eval": 71.2,
        "total": 1048.7,
    },
    "retrieval": {
        "dense": {"i2t_r1": 0.082, "t2i_r1": 0.091}, "clip_moe": {"i2t_r1": 0.346, "t2i_r1": 0.371},
    },
    "vqa": {
        "easy_vqa": {"accuracy": 0.931, "blank_image_accuracy": 0.664, "n": 200},
        "scenes": {"accuracy": 0.712, "n": 200},
    },
}  # fmt: skip
CURVES = (
    "Base CLIP", "DMU stage 1", "DMU stage 2", "DMU stage 3", "Router tuning",
    "Connector pretraining", "Instruction tuning",
)  # fmt: skip


def training_log(start: float, end: float, **more: Any) -> dict[str, Any]:
    rng = random.Random(f"{start}")
    history = [
        {
            "step": 5 * n + 1,
            "loss": end + (start - end) * 0.93**n + rng.uniform(-0.05, 0.05) * start,
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
        }
        for n in range(60)
    ]
    return {"history": history, **more}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_evaluation(folder: Path, task_name: str, share_right: float) -> None:
    """200 of the task's questions with made-up answers, some of them hostile."""
    task, rng = get_task(task_name), random.Random(0)
    items = task.load(200, seed=0)
    correct = [rng.random() < share_right for _ in items]
    predictions = [
        Prediction(
            item.question_id, item.image_key, item.category, item.question,
            item.answer if hit else HOSTILE + "\u2028", item.answer, hit,
        )
        for item, hit in zip(items, correct, strict=True)
    ]  # fmt: skip
    scores = {"task": task_name, "metrics": task.metrics(items, correct), "n": len(items)}
    Evaluation(scores, predictions).save(folder)


def retrieval_json() -> dict[str, Any]:
    keys = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]
    return {
        "dense": dict(zip(keys, (0.082, 0.24, 0.35, 0.091, 0.26, 0.37), strict=True)),
        "clip_moe": dict(zip(keys, (0.346, 0.66, 0.78, 0.371, 0.68, 0.80), strict=True)),
        "num_pairs": 1000,
        "factors": {
            "dense": {f: 0.95 - 0.04 * n for n, f in enumerate(FACTORS)},
            "clip_moe": {f: 0.99 - 0.015 * n for n, f in enumerate(FACTORS)},
        },
    }


@pytest.fixture(scope="session")
def finished_folder(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quickstart leaves behind, as far as the report reads it."""
    out = tmp_path_factory.mktemp("report") / "quick start"
    shutil.copytree(clip_folder, out / "clip_moe")
    stages = [training_log(5.0 + n, 2.0 + n / 2) for n in range(3)]
    write_json(out / "clip" / "training_log.json", training_log(5.5, 1.2))
    write_json(out / "clip_moe" / "training_log.json", training_log(2.4, 1.9, stages=stages))
    write_json(out / "pretrain" / "training_log.json", training_log(3.5, 1.5))
    write_json(out / "mllm" / "training_log.json", training_log(1.4, 0.2))
    for folder in ("clip", "clip_moe", "pretrain", "mllm"):
        (out / folder / "recipe.yaml").write_text(f"# recipe of {folder}\nseed: 0\nsteps: 300\n")
    write_evaluation(out / "eval" / "easy_vqa", "easy_vqa", 0.93)
    write_evaluation(out / "eval" / "easy_vqa-blank", "easy_vqa", 0.66)
    write_evaluation(out / "eval" / "scenes", "scenes", 0.71)
    write_json(out / "eval" / "retrieval.json", retrieval_json())
    return out


@pytest.fixture(scope="session")
def page(finished_folder: Path) -> str:
    write_report(finished_folder, REPORT)
    return (finished_folder / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Ids, tags and attributes of a page; elements that are not closed in order are an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_page_fetches_nothing(page: str) -> None:
    assert "://" not in page
    attributes = [(key, value or "") for _, found in Outline(page).tags
                  for key, value in found.items()]  # fmt: skip
    sources = [value for key, value in attributes if key in ("src", "href", "xlink:href")]
    assert all(value.startswith(("data:", "#")) for value in sources)


def test_page_has_no_script_and_escapes_what_it_shows(page: str) -> None:
    assert "script" not in {tag for tag, _ in Outline(page).tags}
    assert "&lt;script&gt;alert(" in page


def test_ids_are_unique(page: str) -> None:
    ids = [found["id"] for _, found in Outline(page).tags if "id" in found]
    assert len(ids) == len(set(ids))


def test_drawings_take_their_colors_from_the_page(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert not [color for svg in drawings for color in re.findall(r"#[0-9a-f]{6}\b", svg)]


def test_headline_numbers_are_shown(page: str) -> None:
    percentages = ("93.1", "66.4", "67.0", "8.2", "34.6", "9.1", "37.1")
    shown = [f"{number}\u00a0%" for number in percentages] + ["17 min 29 s"]
    assert not [number for number in shown if number not in page]


def test_every_stage_has_a_loss_curve(page: str) -> None:
    titles = re.findall(r'<svg role="img" aria-label="([^":]*): loss', page)
    assert tuple(titles) == CURVES


def test_routing_has_a_row_for_each_block_and_a_cell_for_each_expert(page: str) -> None:
    assert len(re.findall(r"--heat: \d+%", page)) == (3 + 2) * 4


def test_recipes_versions_and_hardware_are_shown(page: str) -> None:
    assert all(f"# recipe of {name}" in page for name in ("clip", "clip_moe", "pretrain", "mllm"))
    assert "2.14.0" in page and "15.6" in page


def test_commands_can_be_pasted(page: str, finished_folder: Path) -> None:
    shown = html.unescape(page)
    assert f"mllm chat '{finished_folder}/mllm' --image" in shown
    assert f"from_pretrained('{finished_folder}/mllm')" in shown


def test_examples_are_drawn_from_every_task_alike(finished_folder: Path) -> None:
    examples, mistakes = draw_examples(finished_folder, seed=0)
    assert [one.task for one in examples] == ["easy-VQA"] * 6 + ["Scenes"] * 6
    assert (len(examples), len(mistakes)) == (NUM_EXAMPLES, NUM_MISTAKES)
    assert not any(one.correct for one in mistakes)


def test_examples_depend_on_the_seed_alone(finished_folder: Path) -> None:
    assert draw_examples(finished_folder, 1) == draw_examples(finished_folder, 1)
    assert draw_examples(finished_folder, 1) != draw_examples(finished_folder, 2)


def test_missing_file_is_told(finished_folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished_folder, tmp_path / "out")
    (out / "pretrain" / "training_log.json").unlink()
    with pytest.raises(InputError, match="pretrain.training_log.json"):
        write_report(out, REPORT)


def test_running_mean_of_a_constant_is_the_constant() -> None:
    assert running_mean([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7440, "2 h 04 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_words_alone_is_what_the_most_frequent_answers_get() -> None:
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in EasyVQA("train").questions:
        answers[question.text][question.answer] += 1
    likeliest = {text: counts.most_common(1)[0][0] for text, counts in answers.items()}
    asked = EasyVQA("test").questions
    right = sum(likeliest.get(question.text) == question.answer for question in asked)
    assert right / len(asked) == pytest.approx(WORDS_ALONE["easy_vqa"], abs=5e-4)
