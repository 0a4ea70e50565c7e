"""The interface of an unlearning method."""

from abc import ABC, abstractmethod
from typing import Literal

import torch

from fedunlearn.errors import UserError
from fedunlearn.methods.alternates import Alternates
from fedunlearn.methods.retain import retain_loss, retain_needs
from fedunlearn.methods.tokens import Memory, Need, StepDone, StepTotals, TokenLosses

RetainTerm = Literal["nll", "kl", "none"]


class Unlearner(ABC):  # noqa: B024  what `method` may name: a loss that clients minimise, or a method of the server's
    """An unlearning method, local (Method) or server-side (server_methods.base.ServerMethod)."""


class Method(Unlearner):
    """A forget loss F and its weights: the total is L = gamma F + alpha R.

    Members are frozen dataclasses with the fields gamma, alpha and retain where they have a retain term.
    Law: summed over the micro-batches of a step, `forget` and `retain_loss` equal their values on the step in one batch (to
    rounding), for they divide by the step's totals, never by the micro-batch's.
    """

    gamma: float
    alpha: float
    retain: str

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """What `forget` reads beside rows and labels."""

    @abstractmethod
    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """Gives this micro-batch's share of F, a float32 scalar with gradient."""

    @property
    def retain_needs(self) -> frozenset[Need]:
        """What `retain_loss` reads."""
        return retain_needs(self.retain)

    def retain_loss(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """Gives this micro-batch's share of R, a float32 scalar with gradient."""
        return retain_loss(self.retain, batch, totals)

    def hidden_layer(self, num_layers: int) -> int:
        """Gives the decoder block, counted from 0, whose output Need.HIDDEN means. Raises UserError for one the model lacks."""
        raise ValueError(f"{type(self).__name__} declares hidden states but names no layer")

    @property
    def skipped_labels(self) -> int:
        """How many of each row's first labels `forget` does not read."""
        return 0

    @property
    def alternates(self) -> Alternates:
        """Where the answers of Need.ALTERNATES come from."""
        return "none"

    def memory(self) -> Memory:
        """What a client remembers when a request begins: scalars by name, which return to it in every later round."""
        return {}

    def retain_weight(self, memory: Memory) -> float:
        """The weight of R in this step."""
        return self.alpha

    def remember(self, memory: Memory, done: StepDone) -> Memory:
        """Gives what is remembered after an optimiser step; the same names."""
        return memory


def check_weights(name: str, gamma: float, alpha: float, retain: str) -> None:
    """Refuses weights without sense: raises UserError for a negative one, gamma = 0, NaN, or alpha beside the retain term it does not fit."""
    if not (gamma > 0 and alpha >= 0):
        raise UserError(f"method {name}: gamma={gamma} must be above 0 and alpha={alpha} not negative")
    if alpha == 0 and retain != "none":
        raise UserError(
            f"method {name}: retain={retain!r} with alpha=0 would be computed and thrown away: set method.retain=none or alpha above 0"
        )
    if alpha != 0 and retain == "none":
        raise UserError(
            f"method {name}: alpha={alpha} weighs a retain term, and retain='none' has none: set method.alpha=0, or choose a retain term"
        )
