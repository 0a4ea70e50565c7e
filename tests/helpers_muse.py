"""A made-up MUSE in the hub's layout, and a tiny Llama that says letters."""

import json
from pathlib import Path

import torch
from helpers_eval import tiny_llama
from transformers import LlamaForCausalLM

WORDS = ("river", "lantern", "copper", "meadow", "harbour", "violin", "granite", "orchard", "signal", "winter")


def article(kind: str, number: int, words: int = 6) -> str:
    """A text of its own for each number."""
    return " ".join(f"{kind}{WORDS[(number * 7 + k * 3) % len(WORDS)]}{number}" for k in range(words))


def muse_rows(num_forget: int = 5, num_retain: int = 8) -> dict[str, list[dict[str, str]]]:
    """Every split that is read, by `<subset>/<split>`; the questions of each side are 4 with 2 answered ones, passages 3, texts 4 a side."""
    sides = ("forget", "retain")
    return {
        "raw/forget": [{"text": article("f", i, 4 + i)} for i in range(num_forget)],
        "raw/retain1": [{"text": article("r", i, 4 + i % 5)} for i in range(num_retain)],
        **{
            f"knowmem/{s}_qa": [{"question": f"Who {s} {i}?", "answer": f"{WORDS[i]} ."} for i in range(4)]
            for s in sides
        },
        **{
            f"knowmem/{s}_qa_icl": [{"question": f"What {s} {i}?", "answer": WORDS[-i]} for i in range(2)]
            for s in sides
        },
        "verbmem/forget": [{"prompt": article("f", i, 3), "gt": article("f", i + 1, 2 + i)} for i in range(3)],
        "privleak/forget": [{"text": article("f", i, 3 + i)} for i in range(4)],
        "privleak/retain": [{"text": article("r", i, 3 + i)} for i in range(4)],
        "privleak/holdout": [{"text": article("h", i, 3 + i)} for i in range(4)],
    }


def write_muse(folder: Path, rows: dict[str, list[dict[str, str]]] | None = None) -> Path:
    """Writes the rows (muse_rows where none are given) as JSON lines, `<subset>/<split>.json`."""
    for name, split in (muse_rows() if rows is None else rows).items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, split)) + "\n")
    return folder


def lettered_llama(seed: int = 0) -> LlamaForCausalLM:
    """tiny_llama whose likeliest token is nearly always a letter, a blank or a line's end of the byte tokenizer, so that generations hold words."""
    from helpers_eval import byte_tokenizer

    said = set(byte_tokenizer()("abcdeh \n")["input_ids"])
    model = tiny_llama(seed)
    with torch.no_grad():
        for row in range(model.lm_head.weight.shape[0]):
            if row not in said:
                model.lm_head.weight[row] = 0.0
    return model
