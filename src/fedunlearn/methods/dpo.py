"""Direct preference optimisation against alternate answers (Rafailov et al. 2023, arXiv:2305.18290)."""

from dataclasses import dataclass

from fedunlearn.methods.alternates import Alternates
from fedunlearn.methods.preference import Preference


@dataclass(frozen=True, kw_only=True)
class DPO(Preference):
    """The preference loss with alternates of the user's own, one or more a row, from data.alternates_path.

    One row at beta 1: two tokens with nll ln 3 and 1 against reference 1, an alternate of two with 2 and 1 against 3. The margin is ln 3, its
    sigmoid 3/4: F = -2 ln(3/4) = 2 ln(4/3), gradient -1/2 for each token of the original, 1/2 for each of the alternate.
    """

    @property
    def alternates(self) -> Alternates:
        """The user's own, row by row."""
        return "pairs"
