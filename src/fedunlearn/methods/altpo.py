"""AltPO: preference optimisation towards other answers of the model's own (Mekala et al. 2025, arXiv:2409.13474)."""

from dataclasses import dataclass

from fedunlearn.methods.alternates import Alternates, Sampled
from fedunlearn.methods.preference import Preference

PROMPT = (
    "Question: {question}\n"
    "A known answer: {answer}\n"
    "Write one other answer to the question, as long and in the same style, in which every fact is a different, plausible one. "
    "Reply with that answer alone."
)


@dataclass(frozen=True, kw_only=True)
class AltPO(Preference):
    """The preference loss with `samples` alternates a row, drawn at temperature 1 from the reference, one of them at every access.

    An alternate that equals the answer is drawn again, at most `tries` times, then the run ends with an error that names the row. prompt: asks the
    model for another answer, with {question} and {answer} in it; null: the bare question, for models that follow no prompts.
    One row at beta 1: two tokens with nll 1 and 2 as the reference has them, an alternate of one with 1 against ln 3 + 1. The margin is ln 3:
    F = -2 ln(3/4) = 2 ln(4/3), gradient -1/2 for each token of the answer, 1/2 for the alternate's.
    """

    samples: int = 5
    tries: int = 20
    prompt: str | None = PROMPT
    max_new_tokens: int = 100

    @property
    def alternates(self) -> Alternates:
        """Samples of the reference."""
        return Sampled(count=self.samples, tries=self.tries, prompt=self.prompt, max_new_tokens=self.max_new_tokens)
