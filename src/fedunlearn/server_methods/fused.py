"""FUSED-like: unlearning by a separate adapter that can be taken off again (Zhong et al. 2025, arXiv:2502.20709)."""

from dataclasses import dataclass

from fedunlearn.server_methods.base import Beginning, ServerMethod


@dataclass(frozen=True, kw_only=True)
class FUSED(ServerMethod):
    """The adapter as it is becomes a frozen side-car; fresh factors beside it are trained on retain rows by everyone who has some. Without these factors the
    model is the one before: the unlearning is undone.

    The paper picks layers and sparse entries; here it is all of the LoRA targets.
    """

    @property
    def beginning(self) -> Beginning:
        """Fresh factors over a frozen adapter."""
        return "fresh"
