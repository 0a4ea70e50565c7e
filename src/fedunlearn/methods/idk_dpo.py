"""IdkDPO: preference optimisation towards refusals (Maini et al. 2024, arXiv:2401.06121)."""

from dataclasses import dataclass

from fedunlearn.methods.alternates import Alternates
from fedunlearn.methods.dpo import DPO


@dataclass(frozen=True, kw_only=True)
class IdkDPO(DPO):
    """DPO whose alternate is a refusal: a line of data.idk_path, drawn anew at every access."""

    @property
    def alternates(self) -> Alternates:
        """Refusals."""
        return "idk"
