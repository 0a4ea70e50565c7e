"""Tasks of lm-evaluation-harness that need no network: a folder of YAMLs over JSON lines, and the same numbers by a plain loop."""

import json
from pathlib import Path

import torch

QUESTIONS = (
    ("Where was the author born?", ["in a town", "on the moon", "by the sea in the north"], 0),
    ("What does the author write?", ["novels", "poems about the rain"], 1),
    ("Who taught the author?", ["a teacher", "nobody", "the sea"], 2),
    ("When was the first book printed?", ["in 1950", "in the year after"], 0),
    ("Why does the author travel?", ["to learn", "to rest a while"], 1),
)
SENTENCES = (("The author was born", "in a small town"), ("A novel is", "a long story"), ("The sea", "is wide"))

CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.5}}
"""
OF_SENTENCES = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sentences.jsonl}}}}
test_split: test
doc_to_text: "{{{{start}}}}"
"""
CONTINUED = """
task: pocket_sentences
output_type: loglikelihood
doc_to_target: " {{{{end}}}}"
num_fewshot: 0
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
ANSWERED = """
task: pocket_answers
output_type: generate_until
doc_to_target: "{{{{end}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
GROUP = """
group: pocket_general
task: [pocket_choices, pocket_more_choices]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""


def write_tasks(folder: Path) -> Path:
    """Writes the tasks and their rows; gives the folder."""
    folder.mkdir()
    questions = [{"question": text, "choices": choices, "answer": right} for text, choices, right in QUESTIONS]
    sentences = [{"start": start, "end": end} for start, end in SENTENCES]
    for name, rows in (("questions", questions), ("sentences", sentences)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("pocket_choices", "pocket_more_choices"):
        (folder / f"{name}.yaml").write_text(CHOICES.format(name=name, folder=folder))
    (folder / "sentences.yaml").write_text((OF_SENTENCES + CONTINUED).format(folder=folder))
    (folder / "answers.yaml").write_text((OF_SENTENCES + ANSWERED).format(folder=folder))
    (folder / "group.yaml").write_text(GROUP)
    return folder


def plain_logp(model, tokenizer, context: str, continuation: str) -> float:
    """Sums log p of the continuation's tokens, one row at a time, the model's special tokens in front as the tokenizer puts them."""
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), dim=-1)
    return sum(float(logp[i - 1, whole[i]]) for i in range(len(before), len(whole)))


def plain_choices(model, tokenizer) -> list[list[float]]:
    """The log-probability of each choice of each question."""
    return [
        [plain_logp(model, tokenizer, f"Question: {text}\nAnswer:", f" {choice}") for choice in choices]
        for text, choices, _ in QUESTIONS
    ]
