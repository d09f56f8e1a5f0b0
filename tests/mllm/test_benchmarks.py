"""The benchmarks' tasks on small files in the formats in which they are distributed."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from mllm.evaluate import Prediction
from mllm.evaluate_scores import judge
from mllm.tasks import TASKS, get_task
from vision_moe import InputError

FOLDER = Path(__file__).parent / "benchmarks"
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
TOWELS = "How many towels?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER
ROCK = "Context: Rocks are hard.\nWhich is a rock?\nA. granite\nB. oak" + LETTER
COUNT = "Look closely.\nWhich is right?\nA. one\nB. two\nC. three" + LETTER
EYES = "Are the eyes open?\nA. Open\nB. Closed" + LETTER
CAPTION = "Provide a one-sentence caption for the provided image."
DOG = "Is there a dog in the image?" + SHORT
MME = "Is there a dog? Please answer yes or no." + SHORT

# Task, folder, its first prompt, perfect answers and the metrics that they must get.
CASES = [
    ("vqav2", "vqav2", "Is it red?" + SHORT, ["Yes", "two", "a dog"],
     {"accuracy": 1, "accuracy_number": 1}),
    ("vqav2", "vqav2_parquet", "Is it red?" + SHORT, ["Yes.", "2"], {"accuracy": 1}),
    ("gqa", "gqa", "Is it cloudy?" + SHORT, ["No.", "Blue"],
     {"accuracy": 1, "accuracy_verify": 1, "accuracy_query": 1}),
    ("textvqa", "textvqa", "what is the brand?" + SHORT, ["Nokia"], {"accuracy": 1}),
    ("textvqa_ocr", "textvqa", "what is the brand?\nReference OCR token: NOKIA, 2:50" + SHORT,
     ["Nokia"], {"accuracy": 1}),
    ("textvqa_ocr", "textvqa_parquet",
     "what is the brand?\nReference OCR token: NOKIA, 2:50" + SHORT, ["Nokia"], {"accuracy": 1}),
    ("vizwiz", "vizwiz", "What is this?" + UNANSWERABLE + SHORT, ["Soap"], {"accuracy": 1}),
    ("vizwiz", "vizwiz_parquet", "What is this?" + UNANSWERABLE + SHORT, ["Soap"],
     {"accuracy": 1}),
    ("pope", "pope", DOG, ["Yes", "No", "Yes", "No, there is not", "Yes", "Yes"],
     {"accuracy": 1, "f1": 1, "mean_f1": 1, "yes_share": 4 / 6, "f1_adversarial": 1}),
    ("pope", "pope_parquet", DOG, ["yes", "no"], {"accuracy": 1, "mean_f1": 1}),
    ("mme", "mme", MME, ["Yes", "No"] * 4,
     {"existence": 200, "posters": 200, "perception": 600, "cognition": 200}),
    ("mme", "mme_parquet", "Is it a dog?" + SHORT, ["Yes", "No"], {"cognition": 200}),
    ("mmbench", "mmbench", COUNT, ["B", "A", "C", "A", "B"],
     {"accuracy": 1, "accuracy_counting": 1, "accuracy_first_turn": 1}),
    ("mmbench_single", "mmbench", COUNT, ["B. two", "(A)"], {"accuracy": 1}),
    ("mmbench", "mmbench_parquet", COUNT, ["B", "A", "C"], {"accuracy": 1}),
    ("scienceqa", "scienceqa", ROCK, ["A", "C. dog"], {"accuracy": 1, "accuracy_image": 1}),
    ("scienceqa", "scienceqa_parquet", ROCK, ["A", "The answer is C."],
     {"accuracy": 1, "accuracy_image": 1}),
    ("seed", "seed", TOWELS, ["A"], {"accuracy": 1, "accuracy_Scene Understanding": 1}),
    ("seed", "seed_parquet", TOWELS, ["A"], {"accuracy": 1}),
    ("coco_caption", "coco_caption", CAPTION,
     ["a red square on a wall", "the blue sea at noon today"], {}),
    ("coco_caption", "coco_caption_parquet", CAPTION,
     ["a red square on a wall", "the blue sea at noon today"], {}),
    ("mmvp", "mmvp", EYES, ["A", "(B)"], {"pair_accuracy": 1, "accuracy": 1}),
    ("mmvp", "mmvp_parquet", EYES, ["A", "B"], {"pair_accuracy": 1}),
    ("custom", "custom", "What color?", ["Crimson.", "B", "4"], {"accuracy": 1}),
    ("custom", "custom/questions.jsonl", "What color?", ["red", "b", "4"], {"accuracy": 1}),
]  # fmt: skip
IDS = [f"{name}-{folder}" for name, folder, *_ in CASES]


def predict(task, items, texts):
    return [
        Prediction(
            item.question_id, item.image_key, item.category, task.prompt(item), text, item.answer,
            answers=item.answers, options=item.options,
        )
        for item, text in zip(items, texts, strict=True)
    ]  # fmt: skip


def score(task, items, texts, seed=0):
    return judge(task, predict(task, items, texts), seed)[1]


@pytest.mark.parametrize(("name", "folder", "prompt", "texts", "metrics"), CASES, ids=IDS)
def test_format(name, folder, prompt, texts, metrics):
    task = get_task(name, str(FOLDER / folder))
    assert task.name == name
    items = task.load()
    assert task.prompt(items[0]) == prompt
    for item in items:
        if item.image_key is not None:
            assert task.open_image(item.image_key).mode == "RGB"
    found = score(task, items, texts)
    assert found["n"] == found["n_scored"] == len(texts)
    assert found["metrics"] | metrics == pytest.approx(found["metrics"])
    assert found["problems"]["unparsable"]["count"] == 0
    for metric, (low, high) in found["intervals"].items():
        assert low <= found["metrics"][metric] + 1e-9
        assert high >= found["metrics"][metric] - 1e-9


@pytest.mark.parametrize(("name", "folder", "prompt", "texts", "metrics"), CASES, ids=IDS)
def test_empty_answers_are_counted_and_divide_nothing_by_zero(
    name, folder, prompt, texts, metrics
):
    task = get_task(name, str(FOLDER / folder))
    items = task.load()
    found = score(task, items, [""] * len(items))
    assert found["problems"]["empty"] == {
        "count": len(items), "ids": [item.question_id for item in items]
    }  # fmt: skip
    assert found["metrics"].keys() == found["intervals"].keys()


def test_captions_of_the_references_words_score_high():
    task = get_task("coco_caption", str(FOLDER / "coco_caption"))
    items = task.load()
    right = score(task, items, ["a red square on a wall", "the blue sea at noon today"])
    swapped = score(task, items, ["the blue sea at noon today", "a red square on a wall"])
    # The second picture has one reference: its own words score the full 10.
    assert right["metrics"]["cider"] > 5
    assert swapped["metrics"]["cider"] < 0.1


def test_wide_tables_leave_the_limit_of_other_readers_as_it_was():
    limit = csv.field_size_limit()
    get_task("mmbench", str(FOLDER / "mmbench")).load()
    assert csv.field_size_limit() == limit


def test_one_wrong_rotation_makes_a_circular_question_wrong():
    task = get_task("mmbench", str(FOLDER / "mmbench"))
    found = score(task, task.load(), ["B", "A", "B", "A", "B"])
    assert found["metrics"]["accuracy"] == 0.5
    assert found["metrics"]["accuracy_first_turn"] == 1


def test_rotations_move_every_option_through_every_place():
    task = get_task("mmbench", str(FOLDER / "mmbench"))
    turns = [item for item in task.load() if task.group(item) == "241"]
    assert [item.options for item in turns] == [
        ("one", "two", "three"), ("two", "three", "one"), ("three", "one", "two")
    ]  # fmt: skip
    assert [item.options["ABC".index(item.answer)] for item in turns] == ["two"] * 3


def test_pair_with_one_right_answer_is_wrong():
    task = get_task("mmvp", str(FOLDER / "mmvp"))
    assert score(task, task.load(), ["A", "A"])["metrics"] == {"pair_accuracy": 0, "accuracy": 0.5}


def test_pope_answer_that_says_neither_is_counted():
    task = get_task("pope", str(FOLDER / "pope"))
    found = score(task, task.load(), ["a dog", "No", "Yes", "No", "Yes", "Yes"])
    assert found["problems"]["unparsable"]["ids"] == ["random-1"]


def test_question_with_nine_answers_is_reported():
    task = get_task("vqav2", str(FOLDER / "vqav2"))
    found = score(task, task.load(), ["yes", "2", "dog"])
    assert found["problems"]["few_answers"]["ids"] == ["73000"]


def test_questions_about_one_picture_share_its_key():
    task = get_task("vqav2", str(FOLDER / "vqav2_parquet"))
    assert len({item.image_key for item in task.load()}) == 1


def test_llava_questions_keep_their_prompt_and_have_no_truth():
    task = get_task("vqav2", str(FOLDER / "vqav2_llava"))
    items = task.load()
    assert task.prompt(items[0]) == "Is it red?" + SHORT
    found = score(task, items, ["yes", "dog"])
    assert (found["metrics"], found["n_scored"]) == ({}, 0)
    assert found["problems"]["unlabelled"]["count"] == 2


def test_vqav2_submission_answers_every_test_question():
    task = get_task("vqav2", str(FOLDER / "vqav2_llava"))
    answers = list(zip(task.load(), ["Yes.", "A dog"], strict=True))
    assert task.submission(answers) == [
        {"question_id": 1, "answer": "yes"},
        {"question_id": 2, "answer": "dog"},
        {"question_id": 3, "answer": ""},
    ]


def test_vizwiz_submission_names_the_picture():
    task = get_task("vizwiz", str(FOLDER / "vizwiz"))
    assert task.submission([(task.load()[0], "The soap!")]) == [
        {"image": "VizWiz_val_00000000.jpg", "answer": "soap"}
    ]


def test_mmbench_submission_has_the_questions_own_turn():
    task = get_task("mmbench", str(FOLDER / "mmbench"))
    items = task.load()
    rows = task.submission([(item, "B") for item in items])
    assert [row["index"] for row in rows] == [241, 252]
    assert rows[0] == {
        "index": 241, "question": "Look closely.\nWhich is right?", "A": "one", "B": "two",
        "C": "three", "D": "", "prediction": "B",
    }  # fmt: skip


def test_task_without_a_server_says_so():
    with pytest.raises(InputError, match="'gqa' has no test server"):
        get_task("gqa", str(FOLDER / "gqa")).submission([])


FILE_TASKS = [name for name in TASKS if name not in ("easy_vqa", "scenes", "scenes_compositional")]


@pytest.mark.parametrize("name", FILE_TASKS)
def test_missing_file_is_told_with_its_benchmark_and_place(name, tmp_path):
    with pytest.raises(InputError) as told:
        get_task(name, str(tmp_path))
    task = TASKS[name](None)
    assert task.title in str(told.value)
    assert str(tmp_path) in str(told.value)
    assert task.needed_files[0] in str(told.value)


@pytest.mark.parametrize("name", FILE_TASKS)
def test_without_data_and_hub_the_files_are_named(name):
    with pytest.raises(InputError, match="--data"):
        get_task(name)


def test_second_file_that_is_missing_is_named(tmp_path):
    shutil.copytree(FOLDER / "textvqa", tmp_path / "t")
    (tmp_path / "t" / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(InputError, match="TextVQA: 'TextVQA_Rosetta_OCR_v0.2_val.json'"):
        get_task("textvqa_ocr", str(tmp_path / "t")).load()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "not JSON"),
        ('{"questions": []}', "the field 'annotations' is not a list"),
        ('{"annotations": [3]}', "annotations 0: not an object"),
        ('{"annotations": [{"answers": []}]}', "annotations 0: the field 'question_id' is missing"),
        ('{"annotations": [{"question_id": 42000, "answers": 3}]}', "not a list of texts"),
    ],
)
def test_damaged_annotations_are_told_by_record(tmp_path, content, fault):
    shutil.copytree(FOLDER / "vqav2", tmp_path / "v")
    (tmp_path / "v" / "v2_mscoco_val2014_annotations.json").write_text(content)
    with pytest.raises(InputError, match=fault):
        get_task("vqav2", str(tmp_path / "v")).load()


def test_damaged_parquet_is_told(tmp_path):
    (tmp_path / "test-0.parquet").write_bytes(b"PAR1 rubbish")
    with pytest.raises(InputError, match="test-0.parquet: not Parquet"):
        get_task("pope", str(tmp_path))


def test_parquet_files_of_another_split_are_told(tmp_path):
    for name in ("train-0.parquet", "validation-0.parquet"):
        shutil.copy(FOLDER / "pope_parquet" / "test-00000-of-00001.parquet", tmp_path / name)
    with pytest.raises(InputError, match="of train, validation, none of 'test'"):
        get_task("pope", str(tmp_path))


def test_picture_outside_of_the_folder_is_not_opened(tmp_path):
    shutil.copy(FOLDER / "custom" / "red.png", tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    line = {"image": "../secret.png", "question": "?", "answer": "x"}
    (tmp_path / "data" / "questions.jsonl").write_text(json.dumps(line))
    task = get_task("custom", str(tmp_path / "data"))
    with pytest.raises(InputError, match="outside"):
        task.open_image(task.load()[0].image_key)


def test_second_question_of_an_id_is_left_out_and_told(tmp_path):
    lines = [{"question_id": "a", "question": text, "answer": "x"} for text in "pq"]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = get_task("custom", str(tmp_path / "mine.jsonl"))
    assert [item.question for item in task.load()] == ["p"]
    assert task.duplicate_ids == ["a"]


def test_draw_keeps_questions_that_are_scored_together():
    task = get_task("mme", str(FOLDER / "mme"))
    items = task.load(num_questions=3, seed=1)
    assert len(items) == 4
    assert all(sum(task.group(one) == task.group(two) for two in items) == 2
               for one in items)  # fmt: skip
