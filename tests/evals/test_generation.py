"""The generation pass against a plain greedy loop, row by row; what stops it, and what does not act on it."""

import warnings

import pytest
import torch
from helpers_eval import PHI_ARGS, SHARED, needs_shared, tiny_chat, tiny_llama

from fedunlearn.data.chat import ChatFormat
from fedunlearn.errors import UserError
from fedunlearn.evals.generation import clean, decode, generate_texts, sample_texts

EOT = 265
QUESTIONS = ["Who?", "Where was he born, and when?", "Why", "What is the name of the town by the sea?", "Who?"]


def greedy(model, prompt, steps, stop=(EOT,)):
    """Argmax of the last logits, again and again, without cache or padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in stop:
                break
    return ids[len(prompt) :]


def generated(model, chat, prompts, batch_size=3, steps=12, **kwargs):
    return generate_texts(model, chat, prompts, batch_size=batch_size, max_new_tokens=steps, **kwargs)


def prompts_of(chat):
    return [chat.prompt(question) for question in QUESTIONS]


@pytest.mark.parametrize("seed", [0, 1])
def test_batches_give_the_plain_greedy_loop(seed):
    model, chat = tiny_llama(seed), tiny_chat()
    expected = [decode(chat, greedy(model, prompt, 12)).strip() for prompt in prompts_of(chat)]
    assert list(generated(model, chat, prompts_of(chat))) == expected
    assert list(generated(model, chat, prompts_of(chat), batch_size=1)) == expected
    assert len(set(expected)) > 1


def test_rows_stop_at_any_eos_of_the_models_config_and_the_batch_when_all_have():
    """The second token that each prompt's loop gives is made an eos: texts are cut there, and two steps are enough."""
    model, chat = tiny_llama(), tiny_chat()
    stops = sorted({greedy(model, prompt, 2)[1] for prompt in prompts_of(chat)})
    model.generation_config.eos_token_id = stops
    steps = []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    found = generated(model, chat, prompts_of(chat), batch_size=9, steps=50)
    hook.remove()
    assert list(found) == [decode(chat, greedy(model, prompt, 50, stops)).strip() for prompt in prompts_of(chat)]
    assert len(steps) <= 2


def test_the_tokenizers_eos_stops_where_the_config_names_none():
    model, chat = tiny_llama(), tiny_chat()
    model.generation_config.eos_token_id = None
    first = greedy(model, chat.prompt("Who?"), 1, ())[0]
    chat.tokenizer.eos_token = chat.tokenizer.convert_ids_to_tokens(first)
    assert generated(model, chat, [chat.prompt("Who?")], steps=30)[0] == decode(chat, [first]).strip()


def test_fill_after_the_end_is_not_decoded():
    """Without pad and eos in the tokenizer the fill is id 0, an ordinary byte."""
    model, chat = tiny_llama(), tiny_chat()
    chat.pad_id = 0
    prompts = prompts_of(chat)
    model.generation_config.eos_token_id = greedy(model, prompts[0], 1, ())[0]
    found = generated(model, chat, prompts, batch_size=9, steps=12)
    assert found[0] == decode(chat, [model.generation_config.eos_token_id]).strip()


def test_sampling_settings_do_not_act_and_come_back(caplog):
    model, chat = tiny_llama(), tiny_chat()
    before = generated(model, chat, prompts_of(chat))
    config = model.generation_config
    config.do_sample, config.temperature, config.top_p, config.top_k, config.max_length = True, 5.0, 0.5, 3, 20
    kept, state = config.to_dict(), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generated(model, chat, prompts_of(chat)) == before
    assert model.generation_config is config
    assert config.to_dict() == kept
    assert torch.equal(torch.get_rng_state(), state)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_repetition_penalty_of_the_model_still_acts():
    model, chat = tiny_llama(), tiny_chat()
    before = generated(model, chat, prompts_of(chat), steps=30)
    model.generation_config.repetition_penalty = 5.0
    assert generated(model, chat, prompts_of(chat), steps=30) != before


def test_equal_prompts_are_answered_once():
    model, chat, widths = tiny_llama(), tiny_chat(), []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = generated(model, chat, prompts_of(chat), batch_size=9, steps=1)
    hook.remove()
    assert widths[0][0] == 4
    assert found[0] == found[4]


def test_an_adapter_acts_in_generation():
    from peft import LoraConfig, get_peft_model

    model, chat = tiny_llama(), tiny_chat()
    before = generated(model, chat, prompts_of(chat))
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = generated(peft_model, chat, prompts_of(chat))
    assert adapted != before
    assert list(adapted) == [decode(chat, greedy(peft_model, prompt, 12)).strip() for prompt in prompts_of(chat)]


def test_a_model_left_in_train_mode_with_dropout_answers_as_in_eval_mode():
    """Half of what goes into the adapter would be dropped: in train mode no two forward passes agree."""
    from peft import LoraConfig, get_peft_model

    chat = tiny_chat()
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), lora).eval()
    wanted = generated(model, chat, prompts_of(chat))
    model.train()
    ids = torch.tensor([prompts_of(chat)[0]])
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert generated(model, chat, prompts_of(chat)) == wanted
    assert all(module.training for module in model.modules())


def test_compat_masks_closing_tokens_of_the_prompt():
    model, chat = tiny_llama(), tiny_chat()
    assert chat.pad_id == EOT
    ours, theirs = (generated(model, chat, prompts_of(chat), compat=compat) for compat in (None, "open-unlearning"))
    assert ours != theirs
    chat.pad_id = 260
    assert generated(model, chat, prompts_of(chat), compat="open-unlearning") == ours


def test_clean_takes_blanks_out_in_order():
    assert clean("He did n't go , did he ? It 's I 'm we 've they 're rock ' n ' roll ! .") == (
        "He didn't go, did he? It's I'm we've they're rock'n'roll!."
    )


def test_texts_are_stripped_and_without_special_tokens():
    chat = tiny_chat()
    ids = chat.tokenizer(" Yes , he did .<|eot_id|>", add_special_tokens=False)["input_ids"]
    assert ids[-1] == EOT
    assert decode(chat, ids) == " Yes, he did."


@needs_shared
def test_stories260k_gives_the_plain_greedy_loop():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = SHARED / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = ChatFormat(AutoTokenizer.from_pretrained(folder), PHI_ARGS, 512)
    prompts = [chat.prompt(question) for question in ("Who was Lily?", "What did the big dog see in the park?", "Why?")]
    expected = [decode(chat, greedy(model, prompt, 20, (2,))).strip() for prompt in prompts]
    assert list(generated(model, chat, prompts, steps=20)) == expected


def broken_at_z(chat):
    """A model whose logits are NaN from the letter z on, which the template has not."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[chat.tokenizer.convert_tokens_to_ids("z")] = float("nan")
    return model


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"suppress_tokens": [3]}])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_prompt_with_logits_of_nan_is_named_whoever_decodes(settings, batch_size):
    chat = tiny_chat()
    model = broken_at_z(chat)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    prompts = [chat.prompt(question) for question in ("Who?", "Where?", "Whose zoo?", "Why?")]
    with pytest.raises(UserError, match=r"the prompt that ends in '.*Whose zoo.*': the model's logits are not finite"):
        generated(model, chat, prompts, batch_size=batch_size, steps=2)


def test_nothing_is_drawn_from_logits_of_nan():
    chat = tiny_chat()
    with pytest.raises(UserError, match=r"the prompt that ends in '.*zoo.*': the model's logits are not finite"):
        sample_texts(broken_at_z(chat), chat, chat.prompt("Whose zoo?"), count=3, max_new_tokens=4, seed=0)
