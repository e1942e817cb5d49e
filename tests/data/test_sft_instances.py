"""Conversations become tokens with roles: answers are answers, prompts are prompts, and nothing is lost between."""

import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from nemo_longctx.config import ConfigError
from nemo_longctx.data.sft_instances import (
    ANSWER,
    LLAMA2_CHAT_TEMPLATE,
    PROMPT,
    chat_template,
    encode_conversation,
    open_instances,
    read_conversations,
)
from nemo_longctx.data.tokenization import train_bpe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe([f"[INST] What is {i}? [/INST] It is {i * i}. " * 3 for i in range(200)], 400, str(folder), {})
    return PreTrainedTokenizerFast.from_pretrained(folder)


def turn(role, content):
    return {"role": role, "content": content}


CHAT = [
    turn("system", "Be brief."),
    turn("user", "What is 2?"),
    turn("assistant", "Two."),
    turn("user", "And 3?"),
    turn("assistant", "Three!"),
]


def test_llama2_form_is_the_reference_codes(tokenizer):
    ids, roles = encode_conversation(tokenizer, LLAMA2_CHAT_TEMPLATE, CHAT)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    # Llama's reference code: f"{B_INST} {(prompt).strip()} {E_INST} {(answer).strip()} ", bos before and eos after each pair.
    first = f"{bos}[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2? [/INST] Two. {eos}"
    assert tokenizer.decode(ids) == first + f"{bos}[INST] And 3? [/INST] Three! {eos}"
    answers = [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(np.diff(roles)) + 1)]
    assert answers[1::2] == [f" Two. {eos}", f" Three! {eos}"]
    assert roles[0] == PROMPT
    assert roles[-1] == ANSWER


def test_prompt_tokens_are_those_of_generation(tokenizer):
    """What the model is asked with is, token for token, what it was trained after."""
    ids, roles = encode_conversation(tokenizer, LLAMA2_CHAT_TEMPLATE, CHAT[1:3])
    asked = tokenizer.apply_chat_template(CHAT[1:2], chat_template=LLAMA2_CHAT_TEMPLATE, add_generation_prompt=True)
    assert ids[roles == PROMPT].tolist() == asked


def test_generation_marks_belong_to_the_prompt(tokenizer):
    each = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    template = each + "{% if add_generation_prompt %}<assistant>{% endif %}"
    ids, roles = encode_conversation(tokenizer, template, CHAT[1:3])
    assert tokenizer.decode(ids[roles == PROMPT]) == "<user>What is 2?</><assistant>"
    assert tokenizer.decode(ids[roles == ANSWER]) == "Two.</>"


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="renders a turn otherwise"):
        encode_conversation(tokenizer, template, CHAT)


def test_template_names(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="this tokenizer has none"):
        chat_template("tokenizer", tokenizer)
    with pytest.raises(ConfigError, match="no such file"):
        chat_template(str(tmp_path / "none.jinja"), tokenizer)
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert chat_template(str(tmp_path / "own.jinja"), tokenizer) == "{{ messages }}"


@pytest.mark.parametrize(
    "row",
    [
        "{",
        '{"text": "x"}',
        '{"messages": []}',
        '{"messages": "x"}',
        json.dumps({"messages": [turn("user", "a")]}),
        json.dumps({"messages": [turn("assistant", "a"), turn("user", "b")]}),
        json.dumps({"messages": [turn("user", "a"), turn("assistant", " ")]}),
        json.dumps({"messages": [turn("user", "a"), turn("assistant", None)]}),
        json.dumps({"messages": [turn("user", "a"), turn("user", "b"), turn("assistant", "c")]}),
    ],
)
def test_bad_rows_are_named(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + row + "\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2"):
        list(read_conversations(path))


def test_instances_are_cached_by_content(tokenizer, tmp_path):
    path, cache = tmp_path / "rows.jsonl", str(tmp_path / "cache")
    path.write_text("".join(json.dumps({"messages": CHAT[1:3] * n}) + "\n" for n in (1, 2, 3)))
    settings = {"tokenizer": tokenizer, "template": LLAMA2_CHAT_TEMPLATE, "cache_dir": cache}
    made = open_instances(str(path), **settings)
    expected = [encode_conversation(tokenizer, LLAMA2_CHAT_TEMPLATE, CHAT[1:3] * n) for n in (1, 2, 3)]
    for (ids, roles), (want_ids, want_roles) in zip(made, expected, strict=True):
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_array_equal(roles, want_roles)
    files = sorted((tmp_path / "cache").iterdir())
    stamps = [file.stat().st_mtime_ns for file in files]
    assert len(open_instances(str(path), **settings)) == 3
    assert [file.stat().st_mtime_ns for file in files] == stamps
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    assert len(open_instances(str(path), **settings)) == 1
    other = LLAMA2_CHAT_TEMPLATE.replace("[INST]", "[ASK]")
    (asked, _), (told, _) = (open_instances(str(path), **settings | {"template": t})[0] for t in (LLAMA2_CHAT_TEMPLATE, other))
    assert asked.tolist() != told.tolist()


def test_sentencepiece_answers_have_no_lone_space():
    """Tokens are those of the whole text, and each is the prompt's or the answer's."""
    from tiny_models import sentencepiece_tokenizer

    tokenizer = sentencepiece_tokenizer(["It was a bright cold day. What was it? [INST] [/INST]"] * 3)
    messages = [
        {"role": "user", "content": "What was it?"}, {"role": "assistant", "content": "It was a day."},
        {"role": "user", "content": "What?"}, {"role": "assistant", "content": "cold"},
    ]  # fmt: skip
    template = chat_template("llama2", tokenizer)
    tokens, roles = encode_conversation(tokenizer, template, messages)
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens[roles == ANSWER]).split() == ["It", "was", "a", "day.", "</s>", "cold", "</s>"]
    prompt = tokenizer(text[: text.index(" It was")], add_special_tokens=False)["input_ids"]
    assert (roles[: len(prompt)] == PROMPT).all()
    assert roles[len(prompt)] == ANSWER
