"""The model as a plugin of lmms-eval, on a task of local files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mllm.generation import Request, generate_answers
from vision_moe import InputError, open_image

pytest.importorskip("lmms_eval", reason="the extra 'eval' is not installed")

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.models import MODEL_REGISTRY_V2, get_model  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

from mllm.lmms import manifest  # noqa: E402

ROOT = Path(__file__).parents[2]
QUESTIONS = ["is it red?", "how many blue triangles are there?"]
TASK = """
task: mllm_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function utils.process
metric_list:
  - metric: local_accuracy
    aggregation: !function utils.mean
    higher_is_better: true
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
metadata:
  version: 1.0
"""
UTILS = """
from PIL import Image


def visual(doc):
    return [Image.open(doc["image"])]


def process(doc, results):
    return {"local_accuracy": float(results[0] == doc["answer"])}


def mean(values):
    return sum(values) / len(values)
"""


@pytest.fixture(autouse=True, scope="module")
def registered():
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)


@pytest.fixture
def pictures(tmp_path):
    for color in ("red", "blue"):
        Image.new("RGB", (40, 32), color).save(tmp_path / f"{color}.png")
    return [str(tmp_path / f"{color}.png") for color in ("red", "blue")]


@pytest.fixture
def plugin(mllm_folder):
    return get_model("mllm").create_from_arg_string(
        f"pretrained={mllm_folder}", {"batch_size": 2, "device": "cpu"}
    )


def instance(messages, **options):
    arguments = ("", messages, {"max_new_tokens": 8, **options}, 0, "t", "test")
    metadata = {"task": "t", "doc_id": 0, "repeats": 1}
    return Instance("generate_until", arguments, 0, metadata)


def turn(*pictures, text="is it red?"):
    content = [{"type": "image", "url": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def test_entry_point_names_the_manifest():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split('[project.entry-points."lmms_eval.models"]')[1]
    assert re.match(r'\s*mllm = "mllm\.lmms:manifest"', section)
    assert manifest().model_id == "mllm"
    assert get_model("mllm").__name__ == "MLLM"


def test_task_of_local_files_is_scored(mllm, mllm_folder, pictures, tmp_path):
    pytest.importorskip("filelock._api", reason="lmms-eval 0.7 does not run with filelock 4")
    asked = [Request(picture, question) for picture in pictures for question in QUESTIONS]
    answers = generate_answers(*mllm, asked, open_image, max_new_tokens=8, progress=False)
    truth = [*answers[:3], "something else"]
    lines = [
        json.dumps({"image": one.image_key, "question": one.question, "answer": answer})
        for one, answer in zip(asked, truth, strict=True)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "utils.py").write_text(UTILS)
    (folder / "local.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    results = simple_evaluate(
        model="mllm",
        model_args=f"pretrained={mllm_folder}",
        tasks=["mllm_local"],
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    assert results["results"]["mllm_local"]["local_accuracy,none"] == 0.75


def test_answer_ends_at_a_stop_text(plugin):
    plugin.task_dict = {"t": {"test": [None]}}
    (whole,) = plugin.generate_until([instance(lambda _: turn())])
    assert len(whole) > 2
    (cut,) = plugin.generate_until([instance(lambda _: turn(), until=[whole[1:]])])
    assert cut == whole[0]


def test_rounds_go_on_until_the_task_is_done(plugin):
    plugin.task_dict = {"t": {"test": [None]}}

    def to_messages(_document, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return turn()
        return turn(text=previous_output[-1]), round_idx == 2, previous_output, None

    (answers,) = plugin.generate_until_multi_round([instance(to_messages)])
    (first,) = plugin.generate_until([instance(lambda _: turn())])
    (second,) = plugin.generate_until([instance(lambda _: turn(text=first))])
    assert answers == [first, second]


def test_likelihood_of_the_greedy_answer_is_greedy(plugin, pictures):
    plugin.task_dict = {"t": {"test": [None]}}
    picture = Image.open(pictures[0])
    (text,) = plugin.generate_until([instance(lambda _: turn(picture), max_new_tokens=1)])
    arguments = [
        ("is it red?", continuation, lambda _: [picture], 0, "t", "test")
        for continuation in (text, "upper left")
    ]
    metadata = {"task": "t", "doc_id": 0, "repeats": 1}
    found = plugin.loglikelihood(
        [Instance("loglikelihood", one, 0, metadata) for one in arguments]
    )
    assert [greedy for _, greedy in found] == [True, False]
    assert all(value < 0 for value, _ in found)


@pytest.mark.parametrize(
    ("messages", "options", "fault"),
    [
        (turn(), {"temperature": 0.7}, "sampling or beams"),
        (turn() + turn(), {}, "one user turn"),
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], {}, "shows video"),
        (turn("a.png", "b.png"), {}, "a question shows 2"),
        (turn("absent.png"), {}, "absent.png: no such file"),
    ],
)
def test_what_it_cannot_do_is_told(plugin, messages, options, fault):
    plugin.task_dict = {"t": {"test": [None]}}
    with pytest.raises(InputError, match=fault):
        plugin.generate_until([instance(lambda _: messages, **options)])


@pytest.mark.parametrize(("argument", "fault"), [("dtype=int3", "dtype"), ("batch_size=0", "0")])
def test_impossible_argument_is_told(mllm_folder, argument, fault):
    with pytest.raises(InputError, match=fault):
        get_model("mllm").create_from_arg_string(f"pretrained={mllm_folder},{argument}")
