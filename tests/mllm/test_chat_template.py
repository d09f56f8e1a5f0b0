"""Published chat formats on tokenizers of their kind: rendered, cut up, and learnt per turn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AddedToken, CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from mllm.chat_template import (
    CHAT_TEMPLATES,
    IMAGE_TOKEN,
    multimodal_chat_template,
    set_chat_template,
)
from mllm.prompts import ChatPrompts
from vision_moe import InputError

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " detailed, helpful, and polite answers to the user's questions. USER: what? ASSISTANT: yes",
    "what is the color of the circle? how many red triangles are there? one two three red no",
]
QUESTION, ANSWER, FOLLOW_UP = "what is the color?", "red", "how many are there?"


def sentencepiece_tokenizer(form: str) -> PreTrainedTokenizerFast:
    """Llama's kind: bos before every text; ``form`` is how words get their mark."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    # Sentencepiece learns no merges across words, whatever the later form.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(CORPUS, trainer)
    backend.pre_tokenizer = None
    if form == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def processor_of(tokenizer: Any) -> Any:
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(),
        tokenizer=tokenizer,
        chat_template=multimodal_chat_template(tokenizer.chat_template),
    )


KINDS = {
    "v1 legacy": ("v1", "legacy"),
    "v1": ("v1", "metaspace"),
    "llama2 legacy": ("llama2", "legacy"),
    "llama2": ("llama2", "metaspace"),
    "llama3": ("llama3", "bytes"),
    "chatml": ("chatml", "bytes"),
}


@pytest.fixture(params=KINDS)
def processor(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    name, form = KINDS[request.param]
    tokenizer = tokenizer if form == "bytes" else sentencepiece_tokenizer(form)
    set_chat_template(tokenizer, name)
    return processor_of(tokenizer)


def stock_ids(processor: Any, messages: list[dict[str, Any]], prompts: bool = True) -> list[int]:
    """What a stranger gets from the template and the tokenizer alone, one placeholder a picture."""
    text = processor.apply_chat_template(messages, add_generation_prompt=prompts)
    bos = processor.tokenizer.bos_token
    return processor.tokenizer.encode(text, add_special_tokens=not text.startswith(bos))


def user(text: str, num_images: int = 1) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * num_images + [
        {"type": "text", "text": text}]}  # fmt: skip


@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_pieces_are_the_rendered_conversation(
    processor: Any, num_images: int, system: str | None
) -> None:
    prompts = ChatPrompts(processor, 1)
    pieces = prompts.opening_ids(num_images, system)
    pieces += prompts.question_ids(QUESTION, num_images > 0, system)
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = [*opening, user(QUESTION, num_images)]
    assert pieces == stock_ids(processor, messages)
    pieces += prompts.answer_ids(ANSWER) + prompts.follow_up_ids(FOLLOW_UP)
    messages += [{"role": "assistant", "content": ANSWER}, user(FOLLOW_UP, 0)]
    assert pieces == stock_ids(processor, messages)


def test_answer_is_learnt_with_its_end(processor: Any) -> None:
    prompts = ChatPrompts(processor, 1)
    learnt = processor.tokenizer.decode(prompts.answer_ids(ANSWER)).replace(" ", "")
    assert learnt == ANSWER + processor.tokenizer.eos_token
    assert prompts.end_of_turn_ids == [processor.tokenizer.eos_token_id]


def test_picture_within_a_question_stands_there(processor: Any) -> None:
    prompts = ChatPrompts(processor, 1)
    content = [{"type": "text", "text": "is "}, {"type": "image"},
               {"type": "text", "text": " or "}, {"type": "image"},
               {"type": "text", "text": " red?"}]  # fmt: skip
    pieces = prompts.opening_ids(0) + prompts.question_ids(("is ", " or ", " red?"), False)
    assert pieces == stock_ids(processor, [{"role": "user", "content": content}])


def test_v1_reads_as_llava_writes_it() -> None:
    tokenizer = sentencepiece_tokenizer("metaspace")
    set_chat_template(tokenizer, "v1")
    text = processor_of(tokenizer).apply_chat_template(
        [user(QUESTION), {"role": "assistant", "content": ANSWER}, user(FOLLOW_UP, 0)],
        add_generation_prompt=True,
    )
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant"
        " gives detailed, helpful, and polite answers to the user's questions. USER: <image>\n"
        "what is the color? ASSISTANT: red</s>USER: how many are there? ASSISTANT:"
    )


def test_end_of_turn_may_differ_from_the_end_of_sequence(tokenizer: Any) -> None:
    """As Phi-3 has it."""
    tokenizer.eos_token = "<|endoftext|>"
    prompts = ChatPrompts(processor_of(tokenizer), 1)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert prompts.answer_ids(ANSWER)[-1] == ends[0]
    assert prompts.end_of_turn_ids == ends


def test_missing_token_is_named_where_none_may_be_added(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="llama3.*start_header_id"):
        set_chat_template(tokenizer, "llama3", may_grow=False)


def test_template_that_takes_no_system_message_is_told(tokenizer: Any) -> None:
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHAT_TEMPLATES["chatml"].text
    )
    with pytest.raises(InputError, match="no system role"):
        ChatPrompts(processor_of(refusing), 1).opening_ids(1, "Be brief.")
