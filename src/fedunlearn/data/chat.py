"""Questions and answers as token ids: the model's chat template, or tags for models without one; and raw text, without either.

For training (what is a label), scoring (the same) and generation (the prompt alone). The layout is the one of the published
TOFU numbers: labels start where the prompt ends, found by length and never by matching; nothing is cut to fit.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fedunlearn.config.model import TemplateArgs
from fedunlearn.errors import UserError
from fedunlearn.files import canonical_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Shots = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class EncodedRow:
    """One question with one answer, or a piece of raw text.

    input_ids: the whole row, without padding. num_prompt: how many of them are the prompt; input_ids[num_prompt:] are the
    labels, and the label at position t is predicted by the logits at t - 1. There is at least one label and one prompt token.
    """

    input_ids: tuple[int, ...]
    num_prompt: int

    def __post_init__(self) -> None:
        assert 0 < self.num_prompt < len(self.input_ids), f"{self.num_prompt} prompt ids of {len(self.input_ids)}"

    @property
    def num_labels(self) -> int:
        """Labels of the row: the answer's tokens and what closes it."""
        return len(self.input_ids) - self.num_prompt

    @property
    def hash(self) -> str:
        """sha256 of ids and prompt length: what its scores are kept under."""
        return hashlib.sha256(canonical_json([list(self.input_ids), self.num_prompt]).encode()).hexdigest()

    @property
    def labels(self) -> tuple[int, ...]:
        """The label ids, in order."""
        return self.input_ids[self.num_prompt :]


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Gives the id that fills up a batch: the tokenizer's pad, else its eos, else 0. Masks go by length, never by this id."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


class ChatFormat:
    """How a question and an answer become ids, for one tokenizer and one template.

    max_length: tokens of a row, closing token included; a longer row is refused, never cut.
    Without `date_string` a Llama-3.x template writes today's date into each prompt: results then drift from day to day.
    Raises UserError where the tokenizer has no chat template and the template args ask for it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: TemplateArgs, max_length: int) -> None:
        if template.apply_chat_template and not tokenizer.chat_template:
            raise UserError(
                f"model.template_args.apply_chat_template=true, but the tokenizer {tokenizer.name_or_path!r} has no chat template: "
                "set it to false and give the tags user_start_tag, user_end_tag, asst_start_tag and asst_end_tag in model.template_args"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.pad_id = pad_id(tokenizer)
        self._prompts: dict[tuple[str, Shots], tuple[int, ...]] = {}
        self._rows: dict[tuple[str, str, Shots], EncodedRow] = {}
        self._chunks: dict[str, tuple[EncodedRow, ...]] = {}

    def prompt(self, question: str, shots: Shots = ()) -> tuple[int, ...]:
        """Gives the ids after which the answer begins; kept, since a question meets several answers. shots: answered questions that stand before it."""
        if (question, shots) not in self._prompts:
            self._prompts[question, shots] = self._render(question, None, shots)
        return self._prompts[question, shots]

    def encode(self, question: str, answer: str, where: str, shots: Shots = ()) -> EncodedRow:
        """Gives the row's ids, closed by eos where its last id is another one; a row met before is not tokenised again.

        where: name of the row in messages, such as "forget10 row 7". Raises UserError where the row is longer than max_length
        or no label is left after the prompt (an empty answer, or one that merges into the prompt's last token).
        """
        if (question, answer, shots) not in self._rows:
            self._rows[question, answer, shots] = self._encode(question, answer, where, shots)
        return self._rows[question, answer, shots]

    def text(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Gives raw text as ids, without any template. special: with what the tokenizer puts around every text."""
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)[
            "input_ids"
        ]  # a long text that is cut later is no fault to warn of
        return tuple(ids)

    def chunks(self, text: str) -> tuple[EncodedRow, ...]:
        """Cuts raw text into examples of max_length tokens, the last one shorter; each begins with what the tokenizer opens a text with, in addition. Kept.

        Every token of the text is a label, but for a chunk's first one where nothing stands before it. Ids are cut, never decoded and tokenised again. A last piece
        of which no label is left is dropped.
        """
        if text not in self._chunks:
            opening, ids = self.text(""), self.text(text, special=False)
            pieces = ((*opening, *ids[i : i + self.max_length]) for i in range(0, len(ids), self.max_length))
            start = max(1, len(opening))
            self._chunks[text] = tuple(EncodedRow(piece, start) for piece in pieces if len(piece) > start)
        return self._chunks[text]

    def _encode(self, question: str, answer: str, where: str, shots: Shots) -> EncodedRow:
        prompt = self.prompt(question, shots)
        ids = self._render(question, answer, shots)
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1] != eos:
            ids = (*ids, int(eos))
        if len(ids) > self.max_length:
            raise UserError(
                f"{where} has {len(ids)} tokens ({len(prompt)} of them prompt), more than data.max_length={self.max_length}; rows are never "
                f"cut: set data.max_length={len(ids)} or above (in eval.yaml: max_length), or take the row out"
            )
        if not prompt or len(prompt) >= len(ids) or not answer.strip():
            raise UserError(
                f"{where} has no answer token left: its prompt has {len(prompt)} tokens, the whole row {len(ids)} (answer {answer[:60]!r}); "
                "every row needs a prompt and an answer: correct the row, or the tags in model.template_args"
            )
        return EncodedRow(ids, len(prompt))

    @property
    def provenance(self) -> Mapping[str, object]:
        """What a result must remember of the template: the args that are set and the sha256 of the chat template's text."""
        args = {key: value for key, value in asdict(self.template).items() if value is not None}
        if not self.template.apply_chat_template:
            return args
        text = str(self.tokenizer.chat_template)
        return {**args, "chat_template_sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}

    def _render(self, question: str, answer: str | None, shots: Shots) -> tuple[int, ...]:
        return (
            self._render_chat(question, answer, shots)
            if self.template.apply_chat_template
            else self._render_tags(question, answer, shots)
        )

    def _render_chat(self, question: str, answer: str | None, shots: Shots) -> tuple[int, ...]:
        from jinja2.exceptions import TemplateError

        system, date = self.template.system_prompt, self.template.date_string
        chat = [] if system is None else [{"role": "system", "content": system}]
        for asked, answered in shots:
            chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        chat.append({"role": "user", "content": question})
        if answer is not None:
            chat.append({"role": "assistant", "content": answer})
        extra = {} if date is None else {"date_string": date}
        try:
            ids = self.tokenizer.apply_chat_template(
                chat, tokenize=True, return_dict=False, add_generation_prompt=answer is None, **extra
            )
        except TemplateError as error:
            raise UserError(
                f"model.template_args.system_prompt={system!r}: the chat template of {self.tokenizer.name_or_path!r} refuses the chat "
                f"({error}); templates without a system role need system_prompt=null"
            ) from error
        return tuple(ids)

    def _render_tags(self, question: str, answer: str | None, shots: Shots) -> tuple[int, ...]:
        tags = self.template
        before = (
            (tags.user_start_tag, asked, tags.user_end_tag, tags.asst_start_tag, answered, tags.asst_end_tag)
            for asked, answered in shots
        )
        parts = (
            tags.system_prompt_with_special_tokens,
            *(part for shot in before for part in shot),
            tags.user_start_tag,
            question,
            tags.user_end_tag,
            tags.asst_start_tag,
            answer,
        )
        return self.text("".join(part for part in parts if part is not None))
