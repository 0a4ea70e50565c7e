"""What benchmarks/evaluation.py evaluates: TOFU's rows under two tokenizers with a model for each, or the pocket where TOFU is not at hand."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedunlearn.config.model import TemplateArgs
from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.data.pocket.build import ensure_pocket
from fedunlearn.data.tofu import PerturbedRow, Tofu, load_tofu

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers_eval import LLAMA3_ARGS, PHI_ARGS, SHARED, llama3_tokenizer  # noqa: E402

VOCAB = 32_000
# A random model ends no answer: one id in forty does it here, which gives answers as long as TOFU's (mean 41, longest about 100).
EOS_EVERY = 40
MAX_LENGTH = 512
# Questions that are answered for one that is scored: enough for several batches.
GENERATED = 2


@dataclass(frozen=True)
class Asked:
    """One data set: each question's rows in order: the answer, the paraphrased one if any, the wrong ones."""

    name: str
    rows: tuple[tuple[EncodedRow, ...], ...]

    @property
    def plain(self) -> list[EncodedRow]:
        return [rows[0] for rows in self.rows]


@dataclass(frozen=True)
class Bounds:
    """Least ratios of the plain way to ours: time of the base metrics, with all attacks, and of generation; padded positions of the whole of TOFU."""

    base: float
    attacks: float
    generation: float
    positions: float


@dataclass(frozen=True)
class Case:
    """A model and what it is asked. whole: all rows of TOFU, for counts of positions; sets: some of each data set, for times.

    stop: ids that end an answer. bounds: None where the data are no TOFU.
    """

    name: str
    model: PreTrainedModel
    chat: ChatFormat
    whole: tuple[Asked, ...]
    sets: tuple[Asked, ...]
    prompts: tuple[tuple[int, ...], ...]
    stop: tuple[int, ...]
    bounds: Bounds | None


class Folded:
    """Ids numbered anew in the order of their coming, below a smaller vocabulary: different rows stay so, and so do common beginnings."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}

    def ids(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        found = tuple(self.known.setdefault(i, len(self.known) + 1) for i in ids)
        assert len(self.known) < VOCAB, "more different ids than the model has"
        return found

    def row(self, row: EncodedRow) -> EncodedRow:
        return EncodedRow(self.ids(row.input_ids), row.num_prompt)


def random_llama() -> LlamaForCausalLM:
    """About 14 M parameters, ten of them the tied vocabulary; weights large enough that answers differ."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def made_cases(questions: int, pocket_dir: Path) -> list[Case]:
    """The two cases, with that many questions of the larger data sets. Without ../shared: the pocket's rows, no bounds."""
    if not SHARED.is_dir():
        pocket = ensure_pocket(0, pocket_dir)
        small, chat = loaded(pocket.model, TemplateArgs(apply_chat_template=True))
        tofu, names = load_tofu(str(pocket.data)), ("14 M Llama, the pocket's rows", "the pocket")
        larger, bounds = chat, (None, None)
    else:
        small, chat = loaded(SHARED / "models" / "stories260K", PHI_ARGS)
        tofu, names = load_tofu(str(SHARED / "tofu")), ("14 M Llama, Llama-3's tokens", "stories260K")
        larger = ChatFormat(llama3_tokenizer(), LLAMA3_ARGS, MAX_LENGTH)
        bounds = (Bounds(3.5, 5.5, 1.5, 2.5), Bounds(1.7, 2.7, 1.5, 2.2))
    fold = Folded()
    large = made_case(names[0], random_llama(), larger, tofu, questions, bounds[0], fold.row, fold.ids)
    dot = chat.tokenizer("a.", add_special_tokens=False)["input_ids"][-1]
    stories = made_case(names[1], small, chat, tofu, questions, bounds[1], lambda row: row, lambda ids: ids)
    return [replace(large, stop=tuple(range(EOS_EVERY, VOCAB, EOS_EVERY))), replace(stories, stop=(dot,))]


def loaded(folder: Path, template: TemplateArgs) -> tuple[PreTrainedModel, ChatFormat]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), ChatFormat(tokenizer, template, MAX_LENGTH)


def made_case(
    name: str,
    model: PreTrainedModel,
    chat: ChatFormat,
    tofu: Tofu,
    questions: int,
    bounds: Bounds | None,
    row: Callable[[EncodedRow], EncodedRow],
    ids: Callable[[tuple[int, ...]], tuple[int, ...]],
) -> Case:
    """Encodes all data sets; row, ids: what becomes of a row and of a prompt before the model sees them."""
    splits = ("forget10", "retain", "real_authors", "world_facts")
    whole = [
        Asked(split, tuple(tuple(map(row, encoded(chat, asked))) for asked in tofu.perturbed(split)))
        for split in splits
    ]
    holdout = tuple((row(chat.encode(asked.question, asked.answer, "holdout")),) for asked in tofu.rows("holdout10"))
    counts = (questions, questions, questions // 4, questions // 4)
    prompts = [
        ids(chat.prompt(asked.question))
        for split, count in zip(splits, counts, strict=True)
        for asked in spread(tofu.perturbed(split), GENERATED * count)
    ]
    sets = [Asked(asked.name, spread(asked.rows, count)) for asked, count in zip(whole, counts, strict=True)]
    return Case(
        name=name,
        model=model,
        chat=chat,
        whole=(*whole, Asked("holdout10", holdout)),
        sets=(*sets, Asked("holdout10", spread(holdout, questions))),
        prompts=tuple(prompts),
        stop=(),
        bounds=bounds,
    )


def encoded(chat: ChatFormat, asked: PerturbedRow) -> list[EncodedRow]:
    paraphrased = [] if asked.paraphrased_answer is None else [asked.paraphrased_answer]
    return [chat.encode(asked.question, text, "row") for text in (asked.answer, *paraphrased, *asked.perturbed_answers)]


def spread(rows: tuple, count: int) -> tuple:
    """That many rows, at equal steps: fewer of one author than the whole has."""
    return rows[:: max(1, len(rows) // max(1, count))][:count]
