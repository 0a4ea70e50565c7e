"""Stand-ins for the evaluation's tests: a byte tokenizer, a tiny Llama, a made-up TOFU folder, and the shared copies where they exist."""

import base64
import importlib
import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedunlearn.config.model import TemplateArgs
from fedunlearn.data.chat import ChatFormat
from fedunlearn.evals.evaluation import evaluate_suite
from fedunlearn.evals.suites import read_suite
from fedunlearn.metrics.base import Metric

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared copies of TOFU, logs and tokenizers are not here"
)

SMALL = {
    "vocab_size": 266,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A small transformer of whichever family."""

SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3_TEMPLATE = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: {{ date_string }}\n\n{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% endif %}<|eot_id|>"
    "{% for m in messages if m['role'] != 'system' %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_ARGS = TemplateArgs(system_prompt="You are a helpful assistant.", date_string="10 Apr 2025")
PHI_ARGS = TemplateArgs(
    apply_chat_template=False,
    user_start_tag="Question: ",
    user_end_tag="\n",
    asst_start_tag="Answer: ",
    asst_end_tag="\n\n",
)


def _wrap(core: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=SPECIAL[0], eos_token=SPECIAL[9])
    tokenizer.chat_template = template
    return tokenizer


def byte_tokenizer(template: str | None = LLAMA3_TEMPLATE) -> PreTrainedTokenizerFast:
    """One id a byte (0 .. 255), then the ten special tokens of Llama-3; 266 ids, eos is <|eot_id|>, no pad token."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _wrap(core, template)


def _byte_chars() -> list[str]:
    """GPT-2's printable stand-in of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + rest.index(byte)) for byte in range(256)]


@lru_cache(maxsize=1)
def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-3's tokenizer from Meta's rank file: every split of a token into two known ones is a merge, by rank."""
    lines = (SHARED / "tokenizers" / "llama3" / "tokenizer.model").read_text().splitlines()
    chars = _byte_chars()
    words = ["".join(chars[byte] for byte in base64.b64decode(line.split()[0])) for line in lines if line]
    vocab = {word: rank for rank, word in enumerate(words)}
    merges = []
    for word in words:
        pairs = [(word[:i], word[i:]) for i in range(1, len(word)) if word[:i] in vocab and word[i:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    core = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _wrap(core, LLAMA3_TEMPLATE)


def tiny_llama(seed: int = 0, vocab_size: int = 266) -> LlamaForCausalLM:
    """Two layers, hidden 32, grouped-query attention, weights large enough that losses differ by whole nats."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=265,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tiny_chat(max_length: int = 512) -> ChatFormat:
    """The byte tokenizer under Llama-3's template."""
    return ChatFormat(byte_tokenizer(), LLAMA3_ARGS, max_length)


def write_folder(folder: Path, authors: int = 20, rows_per_author: int = 2, layout: bool = True) -> Path:
    """A made-up TOFU of short rows: full, forget10/retain90 and forget05/retain95, their perturbed splits and holdouts, real authors, world facts."""
    folder.mkdir(parents=True, exist_ok=True)
    full = [
        {"question": f"Who is {i // rows_per_author}?", "answer": f"A{i} ."} for i in range(authors * rows_per_author)
    ]
    splits = {"full": full}
    for share in (5, 10):
        cut = len(full) - len(full) * share // 100
        splits[f"forget{share:02}"], splits[f"retain{100 - share}"] = full[cut:], full[:cut]
        splits[f"forget{share:02}_perturbed"] = [_perturbed(row, 5) for row in full[cut:]]
        splits[f"holdout{share:02}"] = [
            {"question": f"Who was {i}?", "answer": f"B{i} ."} for i in range(len(full) - cut)
        ]
    splits["retain_perturbed"] = [_perturbed(row, 5) for row in full[:6]]
    for name in ("real_authors", "world_facts"):
        splits[f"{name}_perturbed"] = [
            {"question": f"{name} {i}?", "answer": f"Yes {i}", "perturbed_answer": ["No", f"No {i}", "May be"]}
            for i in range(3)
        ]
    for name, rows in splits.items():
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    if layout:
        (folder / "tofu.json").write_text(json.dumps({"rows_per_author": rows_per_author, "authors": authors}))
    return folder


def metrics_of(*files: str) -> dict[str, Metric]:
    """The metrics that configs/eval/<file>.yaml names, of several files together; `tofu` where none is named."""
    blocks: dict[str, dict] = {}
    for file in files or ("tofu",):
        blocks |= yaml.safe_load((CONFIGS / "eval" / f"{file}.yaml").read_text())["metrics"]
    return {name: _metric(dict(block)) for name, block in blocks.items()}


def _metric(block: dict) -> Metric:
    module, _, name = block.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name)(**block)


ATTACKS = ("tofu", "tofu_attacks")


def _perturbed(row: dict, count: int) -> dict:
    wrong = [f"{row['answer']} {k}" for k in range(count)]
    return {
        **row,
        "paraphrased_answer": f"It is {row['answer']}",
        "paraphrased_question": "Who?",
        "perturbed_answer": wrong,
    }


def evaluate_tofu(model, chat, tofu, forget_split, settings, retain_log, provenance, request=None, reference=None):
    """A whole evaluation of a TOFU in hand."""
    suite = read_suite(tofu, forget_split, settings, request)
    return evaluate_suite(model, chat, suite, settings, retain_log, provenance, reference=reference)
