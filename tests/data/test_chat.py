"""Questions and answers as ids: what is prompt, what is label, and what is refused."""

import json
from statistics import mean

import pytest
from helpers_eval import (
    LLAMA3_ARGS,
    LLAMA3_TEMPLATE,
    PHI_ARGS,
    SHARED,
    byte_tokenizer,
    llama3_tokenizer,
    needs_shared,
    tiny_chat,
)

from fedunlearn.config.model import TemplateArgs
from fedunlearn.data.chat import ChatFormat, EncodedRow, pad_id
from fedunlearn.data.tofu import load_tofu
from fedunlearn.errors import UserError

BOS, START, END, EOT = 256, 262, 263, 265


def test_labels_are_the_answer_and_its_closing_token():
    """ "Hi" is two bytes; the template closes the answer with <|eot_id|>, which is eos: three labels, nothing appended."""
    chat = tiny_chat()
    row = chat.encode("Who?", "Hi", "row 0")
    assert row.num_labels == 3
    assert row.labels[-1] == EOT
    assert chat.tokenizer.decode(row.labels[:2]) == "Hi"
    assert row.input_ids[: row.num_prompt] == chat.prompt("Who?")


def test_prompt_spells_llama3_layout_with_the_date_given():
    text = tiny_chat().tokenizer.decode(tiny_chat().prompt("Who?"))
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 10 Apr 2025\n\n"
        "You are a helpful assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_eos_is_appended_where_the_template_ends_in_something_else():
    """Qwen's way: the template ends the answer with a token and a newline, so a second closing token follows."""
    chat = ChatFormat(
        byte_tokenizer(LLAMA3_TEMPLATE.replace("<|eot_id|>{% endfor %}", "<|eot_id|>\n{% endfor %}")), LLAMA3_ARGS, 512
    )
    labels = chat.encode("Who?", "Hi", "row 0").labels
    assert labels[-3] == labels[-1] == EOT
    assert chat.tokenizer.decode(labels[-2:-1]) == "\n"


def test_tags_wrap_the_question_and_close_with_eos():
    """Prompt "Question: Who?\\nAnswer: " is 23 bytes, the answer 2, eos 1; the byte tokenizer adds no bos."""
    chat = ChatFormat(byte_tokenizer(None), PHI_ARGS, 512)
    row = chat.encode("Who?", "Hi", "row 0")
    assert chat.tokenizer.decode(row.input_ids) == "Question: Who?\nAnswer: Hi<|eot_id|>"
    assert (row.num_prompt, row.num_labels) == (23, 3)
    assert chat.prompt("Who?") == row.input_ids[:23]


def test_tags_take_a_system_prompt_in_front():
    args = TemplateArgs(
        apply_chat_template=False,
        system_prompt_with_special_tokens="S|",
        user_start_tag="[INST] ",
        user_end_tag=" [/INST]",
        asst_start_tag="",
        asst_end_tag=" ",
    )
    chat = ChatFormat(byte_tokenizer(None), args, 512)
    assert chat.tokenizer.decode(chat.prompt("Who?")) == "S|[INST] Who? [/INST]"


def test_a_row_exactly_as_long_as_allowed_stays_and_one_token_more_is_refused():
    length = len(tiny_chat().encode("Who?", "Hi", "row 0").input_ids)
    assert len(tiny_chat(length).encode("Who?", "Hi", "row 0").input_ids) == length
    with pytest.raises(
        UserError,
        match=rf"forget10 row 7 has {length} tokens .* data.max_length={length - 1}.*set data.max_length={length} or above",
    ):
        tiny_chat(length - 1).encode("Who?", "Hi", "forget10 row 7")


@pytest.mark.parametrize("answer", ["", "  "])
def test_an_answer_without_a_token_is_refused_by_row(answer):
    with pytest.raises(UserError, match=r"full row 3 has no answer token left.*correct the row"):
        tiny_chat().encode("Who?", answer, "full row 3")


def test_no_chat_template_is_refused_with_the_tags_as_way_out():
    with pytest.raises(
        UserError, match=r"apply_chat_template=true, but the tokenizer .* has no chat template.*user_start_tag"
    ):
        ChatFormat(byte_tokenizer(None), LLAMA3_ARGS, 512)


def test_a_template_that_refuses_the_system_role_says_so():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(UserError, match=r"system_prompt='You are.*System role not supported.*system_prompt=null"):
        ChatFormat(byte_tokenizer(template), LLAMA3_ARGS, 512).prompt("Who?")


def test_pad_id_is_pad_then_eos_then_zero():
    tokenizer = byte_tokenizer()
    assert pad_id(tokenizer) == EOT
    tokenizer.pad_token = "<|finetune_right_pad_id|>"
    assert pad_id(tokenizer) == 260
    tokenizer.pad_token = tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0


def test_provenance_tells_two_templates_apart_and_is_plain_json():
    first = tiny_chat().provenance
    other = ChatFormat(byte_tokenizer(LLAMA3_TEMPLATE + " "), LLAMA3_ARGS, 512).provenance
    assert first["date_string"] == "10 Apr 2025"
    assert first["chat_template_sha256"] != other["chat_template_sha256"]
    assert json.loads(json.dumps(dict(first))) == first
    assert "chat_template_sha256" not in ChatFormat(byte_tokenizer(None), PHI_ARGS, 512).provenance


def test_a_row_needs_a_prompt_and_a_label():
    with pytest.raises(AssertionError, match="3 prompt ids of 3"):
        EncodedRow((1, 2, 3), 3)


def _lengths(split: str) -> tuple[list[int], list[int], list[int]]:
    """Prompt lengths, label counts of the answers and of the perturbed answers, all rows."""
    tofu, chat = load_tofu(str(SHARED / "tofu")), ChatFormat(llama3_tokenizer(), LLAMA3_ARGS, 512)
    rows = tofu.perturbed(split)
    encoded = [chat.encode(row.question, row.answer, split) for row in rows]
    wrong = [chat.encode(row.question, answer, split) for row in rows for answer in row.perturbed_answers]
    return [row.num_prompt for row in encoded], [row.num_labels for row in encoded], [row.num_labels for row in wrong]


@needs_shared
@pytest.mark.parametrize(
    ("split", "prompt", "answer", "wrong"),
    [
        ("forget10", 58.4, 36.7, 40.0),
        ("retain", 55.1, 34.1, 38.3),
        ("real_authors", 54.7, 5.0, None),
        ("world_facts", 52.9, 3.6, None),
    ],
)
def test_llama3_lengths_are_the_published_means(split, prompt, answer, wrong):
    prompts, answers, others = _lengths(split)
    assert mean(prompts) == pytest.approx(prompt, abs=0.05)
    assert mean(answers) == pytest.approx(answer, abs=0.05)
    if wrong is not None:
        assert mean(others) == pytest.approx(wrong, abs=0.05)


@needs_shared
def test_llama3_forget10_label_counts_fit_the_published_memorization_scores():
    """exact_memorization is hits / N with N = T_i - 1: score * N is a whole number for each of the 400 rows. Maxima as recorded."""
    prompts, answers, others = _lengths("forget10")
    assert (max(prompts), max(answers), max(others)) == (90, 81, 92)
    log = json.loads((SHARED / "golden/tofu_Llama-3.2-1B-Instruct_retain90/TOFU_EVAL.json").read_text())
    scores = [row["score"] for row in log["exact_memorization"]["value_by_index"].values()]
    assert len(scores) == 400
    hits = [score * (count - 1) for score, count in zip(scores, answers, strict=True)]
    assert max(abs(hit - round(hit)) for hit in hits) < 1e-4


@needs_shared
def test_llama3_wrapper_is_41_tokens():
    tokenizer = llama3_tokenizer()
    question = "Who wrote the play 'Romeo and Juliet'?"
    prompt = ChatFormat(tokenizer, LLAMA3_ARGS, 512).prompt(question)
    assert len(prompt) - len(tokenizer(question, add_special_tokens=False)["input_ids"]) == 41
