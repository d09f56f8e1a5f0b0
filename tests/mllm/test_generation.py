"""Batched greedy answers are those of the stock model, question by question."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mllm.decoding import Decoder
from mllm.generation import Answerer, Request, encode_images, generate_answers
from mllm.products import QuickLinear
from vision_moe import InputError

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
    sizes = []
    original = Decoder.generate

    def counting(self, prefixes, rows, questions):
        sizes.append(len(questions))
        return original(self, prefixes, rows, questions)

    monkeypatch.setattr(Decoder, "generate", counting)
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


def test_picture_runs_once_for_all_of_its_questions(mllm, monkeypatch):
    widths = []
    original = Decoder.extend

    def counting(self, shared, features):
        widths.append(len(features))
        return original(self, shared, features)

    monkeypatch.setattr(Decoder, "extend", counting)
    answer(mllm, REQUESTS, batch_size=2)
    assert sum(widths) == len(IMAGES)


def test_question_without_a_picture_is_answered_as_stock_generate_does(mllm):
    model, processor = mllm
    content = [{"type": "text", "text": QUESTIONS[0]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    new = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], True).strip()
    mixed = [REQUESTS[0], Request(None, QUESTIONS[0]), REQUESTS[1]]
    assert answer(mllm, mixed)[1] == new


def choose(mllm, choices, batch_size=64):
    requests = [Request(key, "which?", choices) for key in IMAGES]
    return answer(mllm, requests, batch_size=batch_size)


def stock_likelihoods(mllm, key, choices):
    model, processor = mllm
    content = [{"type": "image"}, {"type": "text", "text": "which?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    values = []
    for choice in choices:
        inputs = processor(images=IMAGES[key], text=prompt + choice, return_tensors="pt")
        num_new = len(processor.tokenizer.encode(choice, add_special_tokens=False))
        with torch.inference_mode():
            log_probs = model(**inputs).logits.log_softmax(-1)[0, -num_new - 1 : -1]
        new = inputs["input_ids"][0, -num_new:]
        values.append(float(log_probs.gather(-1, new[:, None]).sum()))
    return values


@pytest.mark.parametrize("choices", [("A", "B", "C"), ("upper left", "no", "a blue circle")])
def test_choice_is_the_likeliest_by_the_stock_model(mllm, choices):
    expected = []
    for key in IMAGES:
        values = stock_likelihoods(mllm, key, choices)
        expected.append(choices[values.index(max(values))])
    assert choose(mllm, choices) == expected
    assert choose(mllm, choices, batch_size=1) == expected


def test_unreadable_picture_is_a_fault_of_its_own_answers(mllm):
    def open_image(key):
        if key == "red":
            raise InputError("red.png: not an image that can be read")
        return IMAGES[key]

    found = dict(Answerer(*mllm).answer(REQUESTS, open_image))
    faulty = {request.image_key for request, one in found.items() if one.fault}
    assert faulty == {"red"}
    texts = [found[request].text for request in REQUESTS if request.image_key != "red"]
    assert texts == answer(mllm, [one for one in REQUESTS if one.image_key != "red"])


def test_question_longer_than_the_model_is_a_fault_of_its_own(mllm):
    requests = [Request("red", "circle " * 500), REQUESTS[0]]
    found = dict(Answerer(*mllm).answer(requests, IMAGES.__getitem__))
    assert "too long" in found[requests[0]].fault
    assert found[requests[1]].fault is None


def test_answer_that_is_cut_off_is_not_finished(mllm):
    model, processor = mllm
    model.lm_head = torch.nn.Linear(32, len(processor.tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    letter = processor.tokenizer.encode("z", add_special_tokens=False)[0]
    model.lm_head.bias.data[letter] = 1.0
    found = dict(Answerer(*mllm, max_new_tokens=3).answer(REQUESTS[:1], IMAGES.__getitem__))
    assert not found[REQUESTS[0]].finished


@pytest.mark.parametrize("shape", [(64, 512), (2, 32, 512)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_quick_product_is_that_of_pytorch(shape, has_bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 1536, bias=has_bias)
    x = torch.randn(shape)
    with torch.inference_mode(), QuickLinear():
        quick = layer(x)
    # Seen: 2e-6; both sum 512 products in fp32, in another order.
    assert torch.allclose(quick, layer(x), atol=1e-5)


def test_gradients_go_through_pytorchs_own_product():
    layer = torch.nn.Linear(512, 1536)
    with QuickLinear():
        layer(torch.randn(64, 512)).sum().backward()
    assert layer.weight.grad is not None
