"""IdkDPO: preference optimisation towards refusals (Maini et al. 2024, arXiv:2401.06121)."""

from dataclasses import dataclass

from fedunlearn.methods.alternates import Alternates
from fedunlearn.methods.preference import Preference


@dataclass(frozen=True, kw_only=True)
class IdkDPO(Preference):
    """The preference loss whose alternate is a refusal: a line of data.idk_path, drawn anew at every access.

    One row at beta 0.1: an answer of two tokens with nll 1 and 2, a refusal of one with 5, both as the reference has them:
    F = (2/0.1) ln(2) = 20 ln(2), gradient -1 for each token of the answer, 1 for the refusal's.
    """

    @property
    def alternates(self) -> Alternates:
        """Refusals."""
        return "idk"
