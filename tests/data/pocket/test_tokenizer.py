"""The pocket's tokenizer: it round-trips, and its template puts the prompt's tokens before the answer's."""

import pytest
from transformers import AutoTokenizer

from fedunlearn.data.pocket.tokenizer import BOS, EOT, PAD, SPECIAL_TOKENS, train_tokenizer
from fedunlearn.data.pocket.world import WorldSize, make_world

TEXTS = make_world(0, WorldSize(num_crowd=20)).pretraining.sentences()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 512)


def render(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "text", ["The debut was The Amber Door.", "2 May 1901", "Ünïcödé, 漢字 and 🙂", "a  b\n\nc\td ", "it's"]
)
def test_any_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_size_is_the_one_asked_for_and_special_tokens_come_first(tokenizer):
    assert len(tokenizer) == 512
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]


def test_pad_and_eos_are_two_tokens(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOT, PAD)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_template_is_llama_3s_without_date_and_system_prompt(tokenizer):
    assert render(tokenizer, [user(" Who? "), assistant("Me.")]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nMe.<|eot_id|>"
    )


def test_a_system_prompt_that_is_given_stands_first(tokenizer):
    text = render(tokenizer, [{"role": "system", "content": "Be kind."}, user("Who?")])
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user"
    )


def test_the_generation_prompt_opens_the_assistants_turn(tokenizer):
    assert render(tokenizer, [user("Who?")], add_generation_prompt=True).endswith(
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("answer", ["The hero is Ada Belmakin.", "2 May", "\nline", "..."])
def test_the_prompts_ids_are_the_first_ids_of_the_whole(tokenizer, answer):
    question = [user("When was Ada Belmakin born?")]
    prompt = tokenizer.apply_chat_template(question, tokenize=True, return_dict=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*question, assistant(answer)], tokenize=True, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(whole[len(prompt) : -1]) == answer.strip()


def test_the_wrapper_costs_ten_tokens(tokenizer):
    prompt = tokenizer.apply_chat_template([user("x")], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert len(prompt) == 11


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(TEXTS, 512)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_it_survives_disk(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    chat = [user("Who?"), assistant("Me.")]
    assert loaded.apply_chat_template(chat, tokenize=True, return_dict=False) == tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=False
    )
    assert (loaded.pad_token, loaded.eos_token) == (PAD, EOT)
