"""Batched greedy answers are those of the stock model, question by question."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mllm.generation import Request, encode_images, generate_answers

IMAGES = {
    "gradient": Image.linear_gradient("L").convert("RGB"),
    "radial": Image.radial_gradient("L").convert("RGB"),
    "red": Image.new("RGB", (32, 32), "red"),
}
QUESTIONS = ["is it red?", "how many blue triangles are there to the left of the circle?", "a"]
REQUESTS = [Request(key, question) for question in QUESTIONS for key in IMAGES]


def answer(mllm, requests, **options):
    return generate_answers(*mllm, requests, IMAGES.__getitem__, progress=False, **options)


def stock_answer(mllm, request):
    model, processor = mllm
    content = [{"type": "image"}, {"type": "text", "text": request.question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=IMAGES[request.image_key], text=text, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_answers_are_those_of_stock_generate(mllm):
    assert answer(mllm, REQUESTS) == [stock_answer(mllm, request) for request in REQUESTS]


def test_answers_depend_on_picture_and_question(mllm):
    assert len(set(answer(mllm, REQUESTS))) > 3


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batched_equals_unbatched(mllm, batch_size):
    assert answer(mllm, REQUESTS, batch_size=batch_size) == answer(mllm, REQUESTS)


def test_each_picture_is_encoded_once(mllm):
    opened = []

    def open_image(key):
        opened.append(key)
        return IMAGES[key]

    generate_answers(*mllm, REQUESTS, open_image, progress=False)
    assert sorted(opened) == sorted(IMAGES)


def test_duplicate_requests_are_answered_once(mllm, monkeypatch):
    import mllm.generation as generation

    sizes = []
    original = generation._GreedyDecoder.answer

    def counting(self, features, questions):
        sizes.append(len(questions))
        return original(self, features, questions)

    monkeypatch.setattr(generation._GreedyDecoder, "answer", counting)
    answers = answer(mllm, [REQUESTS[0]] * 5)
    assert sizes == [1]
    assert answers == [answers[0]] * 5


def test_end_of_turn_ends_an_answer(mllm):
    model, processor = mllm
    model.lm_head = torch.nn.Linear(32, len(processor.tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    model.lm_head.bias.data[processor.tokenizer.eos_token_id] = 1.0
    assert answer(mllm, REQUESTS[:2]) == ["", ""]


def test_answers_end_at_the_limit(mllm):
    model, processor = mllm
    model.lm_head = torch.nn.Linear(32, len(processor.tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    letter = processor.tokenizer.encode("z", add_special_tokens=False)[0]
    model.lm_head.bias.data[letter] = 1.0
    assert answer(mllm, REQUESTS[:2], max_new_tokens=3) == ["zzz", "zzz"]


def test_no_requests_give_no_answers(mllm):
    assert answer(mllm, []) == []


def test_bfloat16_autocast_runs(mllm):
    assert len(answer(mllm, REQUESTS[:2], autocast_dtype=torch.bfloat16)) == 2


def test_encoded_pictures_have_one_vector_for_each_image_token(mllm):
    features = encode_images(*mllm, list(IMAGES), IMAGES.__getitem__, progress=False)
    assert {key: tuple(f.shape) for key, f in features.items()} == dict.fromkeys(IMAGES, (16, 32))
