"""AltPO: DPO towards other answers of the model's own (Mekala et al. 2025, arXiv:2409.13474)."""

from dataclasses import dataclass

from fedunlearn.methods.alternates import Alternates, Sampled
from fedunlearn.methods.dpo import DPO

PROMPT = (
    "Question: {question}\n"
    "A known answer: {answer}\n"
    "Write one other answer to the question, as long and in the same style, in which every fact is a different, plausible one. "
    "Reply with that answer alone."
)


@dataclass(frozen=True, kw_only=True)
class AltPO(DPO):
    """DPO with `samples` alternates a row, drawn at temperature 1 from the reference, one of them at every access.

    An alternate that equals the answer is drawn again, at most `tries` times, then the run ends with an error that names the row. prompt: asks the
    model for another answer, with {question} and {answer} in it; null: the bare question, for models that follow no prompts.
    """

    samples: int = 5
    tries: int = 20
    prompt: str | None = PROMPT
    max_new_tokens: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sampled()

    def _sampled(self) -> Sampled:
        return Sampled(count=self.samples, tries=self.tries, prompt=self.prompt, max_new_tokens=self.max_new_tokens)

    @property
    def alternates(self) -> Alternates:
        """Samples of the reference."""
        return self._sampled()
