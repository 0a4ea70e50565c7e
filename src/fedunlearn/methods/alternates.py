"""Where the other answers of a preference loss come from."""

from dataclasses import dataclass
from string import Formatter
from typing import Literal

from fedunlearn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Drawn from the reference model at temperature 1, once for each row by (seed, row).

    count: how many a row. tries: how often an alternate that equals the answer is drawn again.
    prompt: asks for another answer, with {question} and {answer} in it; None = the question as it is. max_new_tokens: length of a draw.
    """

    count: int
    tries: int
    prompt: str | None
    max_new_tokens: int

    def __post_init__(self) -> None:
        at = "method."
        rules = [
            (self.count >= 1, f"{at}samples={self.count} must be at least 1"),
            (self.tries >= 1, f"{at}tries={self.tries} must be at least 1"),
            (self.max_new_tokens >= 1, f"{at}max_new_tokens={self.max_new_tokens} must be at least 1"),
            (
                self.prompt is None or _asks(self.prompt),
                f"{at}prompt={self.prompt!r} must hold {{question}} and {{answer}} and no other braces (write {{{{ and }}}} for one that is meant), or be null (the bare question)",
            ),
        ]
        faults = [fault for holds, fault in rules if not holds]
        if faults:
            raise UserError(*faults)


def _asks(prompt: str) -> bool:
    """Whether a prompt takes question and answer, and nothing else."""
    try:
        fields = [field for _, field, _, _ in Formatter().parse(prompt) if field is not None]
    except ValueError:
        return False
    return set(fields) == {"question", "answer"}


Alternates = Literal["none", "idk", "pairs"] | Sampled
"""idk: a refusal of data.idk_path, drawn anew at every access. pairs: those of data.alternates_path, row by row."""
