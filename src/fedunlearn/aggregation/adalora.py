"""AdaLoRA's budget of ranks, kept by the server over rounds (Zhang et al. 2023, arXiv:2303.10512): importance, schedule, one mask for all modules.

A module's update is s B diag(E) A: triplets of a row of A, an entry of E and a column of B. The paper steps once a gradient; here a step is a round and its
pseudo-gradient the mean update, as in FedOpt (Reddi et al. 2021, arXiv:2003.00295).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fedunlearn.records.adapter import A as PAIR_A
from fedunlearn.records.adapter import B as PAIR_B
from fedunlearn.records.adapter import Tensors

A, E, B = ".lora_A", ".lora_E", ".lora_B"
"""How PEFT names AdaLoRA's tensors, without the `.weight` of a pair: they are plain tensors of an adapter, for no sum of B A is their product."""
SMALL = 1e-5
"""What PEFT adds to the rank that it divides lora_alpha by."""
SENSITIVITY, UNCERTAINTY = "sensitivity", "uncertainty"


@dataclass(frozen=True, kw_only=True)
class AdaLora:
    """AdaLoRA's own settings under PEFT's names; tinit, tfinal and deltaT count rounds.

    init_r: rank of each module at the start, target_r: mean rank at the end. tinit: rounds before the first mask, tfinal: rounds after the last;
    deltaT: a mask every so many rounds. beta1, beta2: smoothing of sensitivity and uncertainty. orth_reg_weight: see training.orthogonality.
    """

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815 - PEFT's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    @property
    def least_rounds(self) -> int:
        """The fewest rounds that leave one in which ranks are given up."""
        return self.tinit + self.tfinal + 1

    def budget(self, number: int, rounds: int, modules: int) -> int:
        """Gives how many ranks all modules together may have after round `number` (from 1) of `rounds` (eq. 12: cubic), rounded down as in PEFT."""
        first, last = self.init_r * modules, self.target_r * modules
        if number <= self.tinit:
            return first
        if self.settles(number, rounds):
            return last
        left = 1 - (number - self.tinit) / (rounds - self.tfinal - self.tinit)
        return int((first - last) * left**3 + last)

    def settles(self, number: int, rounds: int) -> bool:
        """Whether the ranks that a round leaves are those of the end."""
        return number >= rounds - self.tfinal

    def masks(self, number: int, rounds: int) -> bool:
        """Whether a round ends with a mask."""
        return self.settles(number, rounds) or (number > self.tinit and number % self.deltaT == 0)


@dataclass(frozen=True, order=True)
class Triplets:
    """One module's three tensors by name: a [r, d_in], e [r, 1], b [d_out, r]. path: what they begin with."""

    path: str
    a: str
    e: str
    b: str


def triplets_of(names: Iterable[str]) -> tuple[Triplets, ...]:
    """Gives the modules of an AdaLoRA adapter, in name order; none for another. Raises ValueError for a module that lacks one of the three."""
    known = set(names)
    paths = sorted(name.removesuffix(E) for name in known if name.endswith(E))
    found = tuple(Triplets(path, path + A, path + E, path + B) for path in paths)
    for one in found:
        for name in (one.a, one.b):
            if name not in known:
                raise ValueError(f"adapter tensor {one.e!r} stands without {name!r}")
    return found


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What the server remembers of importance, float32, names and shapes of the triplets' tensors: empty before the first round.

    sensitivity: smoothed |w g| (eq. 9); uncertainty: smoothed |I - sensitivity| (eq. 10).
    """

    sensitivity: Tensors = field(default_factory=dict)
    uncertainty: Tensors = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Allocated:
    """tensors: the triplets' tensors after the mask, those of the adapter's others are not among them. kept: ranks that still act, or may again."""

    tensors: Tensors
    importance: Importance
    kept: int


def allocate(
    settings: AdaLora, before: Tensors, mean: Tensors, after: Tensors, old: Importance, number: int, rounds: int
) -> Allocated:
    """Gives the adapter of a round with its mask, and the importance to go on with.

    before: the adapter the round began with; mean: of the clients' adapters, float64, so that g = mean - before; after: what the server's optimiser made of
    it. Sums are float64, what is kept is cast once. A triplet's importance is s(E_i) + mean_j s(A_ij) + mean_j s(B_ji), s = sensitivity * uncertainty (eq. 7,
    11); the `budget` largest of all modules stay, of equal ones the first by name and place. A mask sets E to 0, and the rank may come back
    (clients go on training it); the masks of the last tfinal + 1 rounds set B's column to 0 too, which no gradient moves then, so that it is gone.
    The round that settles ranks adds its own update to the importance, where PEFT's last mask stands on that of the steps before total_step - tfinal.
    """
    modules, scores = triplets_of(after), list[torch.Tensor]()
    sensitivity, uncertainty = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for module in modules:
        parts = dict[str, torch.Tensor]()
        for name in (module.a, module.e, module.b):
            now = after[name].double()
            sensed = (now * (mean[name] - before[name].double())).abs()
            s = _smooth(settings.beta1, old.sensitivity.get(name), sensed)
            u = _smooth(settings.beta2, old.uncertainty.get(name), (sensed - s).abs())
            sensitivity[name], uncertainty[name], parts[name] = s.float(), u.float(), s * u
        scores.append(_pooled(module, parts))
    keep = _kept(settings, modules, scores, before, number, rounds)
    importance = Importance(sensitivity=sensitivity, uncertainty=uncertainty)
    return _allocated(modules, after, keep, importance, settings.settles(number, rounds))


def settle(settings: AdaLora, adapter: Tensors, old: Importance, number: int, rounds: int) -> Allocated:
    """Gives the adapter of a round without any update: where ranks settle, by the importance that is remembered, which stays as it is; before that nothing changes.

    Where no round ever had an update every importance is 0: the first ranks stay, by name and place.
    """
    modules, gone = triplets_of(adapter), settings.settles(number, rounds)
    names = [name for m in modules for name in (m.a, m.e, m.b)]
    known = (
        {name: old.sensitivity[name].double() * old.uncertainty[name].double() for name in names}
        if old.sensitivity
        else {name: torch.zeros_like(adapter[name], dtype=torch.float64) for name in names}
    )
    if gone:
        keep = _kept(settings, modules, [_pooled(m, known) for m in modules], adapter, number, rounds)
    else:
        keep = [~is_gone(adapter[m.e], adapter[m.b]) for m in modules]
    return _allocated(modules, adapter, keep, old, gone)


def _pooled(module: Triplets, parts: Tensors) -> torch.Tensor:
    """The importance of a module's triplets, [r] float64, of that of their entries."""
    return parts[module.e][:, 0] + parts[module.a].mean(1) + parts[module.b].mean(0)


def _allocated(
    modules: tuple[Triplets, ...], after: Tensors, keep: list[torch.Tensor], importance: Importance, gone: bool
) -> Allocated:
    tensors = {n: t for m, k in zip(modules, keep, strict=True) for n, t in _masked(m, after, k, gone).items()}
    return Allocated(tensors=tensors, importance=importance, kept=sum(int(k.sum()) for k in keep))


def _smooth(beta: float, old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return (1 - beta) * new if old is None else beta * old.double() + (1 - beta) * new


def _kept(
    settings: AdaLora,
    modules: tuple[Triplets, ...],
    scores: list[torch.Tensor],
    before: Tensors,
    number: int,
    rounds: int,
) -> list[torch.Tensor]:
    """Which ranks of each module a round leaves, [r] bool. Those that went for good stay away, and no more go with them once the budget is met."""
    alive = [~is_gone(before[m.e], before[m.b]) for m in modules]
    budget = settings.budget(number, rounds, len(modules))
    if not settings.masks(number, rounds) or sum(int(a.sum()) for a in alive) <= budget:
        return alive
    ranked = torch.cat([s.masked_fill(~a, -1.0) for s, a in zip(scores, alive, strict=True)])
    best = torch.sort(ranked, descending=True, stable=True).indices[:budget]
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen[best] = True
    return list(torch.split(chosen, [len(s) for s in scores]))


def is_gone(e: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which ranks went for good, [r] bool: E and the column of B are both 0, which nothing but a mask makes them."""
    return (e[:, 0] == 0) & (b == 0).all(0)


def _masked(module: Triplets, after: Tensors, keep: torch.Tensor, gone: bool) -> Tensors:
    e, b = after[module.e].clone(), after[module.b].clone()
    e[~keep] = 0
    if gone:
        b[:, ~keep] = 0
    return {module.a: after[module.a], module.e: e, module.b: b}


def as_pair(a: torch.Tensor, e: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives a pair of factors with the same product, float64: A [r, d_in] and B [d_out, r], the root of |E| in each and its sign in B."""
    root = e[:, 0].double().abs().sqrt()
    return a.double() * root[:, None], b.double() * (root * e[:, 0].double().sign())


def pairs_in(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Gives an AdaLoRA adapter's modules as pairs of factors under LoRA's names, float64, all ranks; what is no triplet is left out."""
    found: dict[str, torch.Tensor] = {}
    for module in triplets_of(tensors):
        found[module.path + PAIR_A], found[module.path + PAIR_B] = as_pair(
            tensors[module.a], tensors[module.e], tensors[module.b]
        )
    return found


def scales_of_triplets(peft_config: Mapping[str, object], names: Iterable[str]) -> dict[str, float]:
    """Gives the s of s B diag(E) A by module name: lora_alpha / (init_r + 1e-5), with PEFT's rounding of that to float32; empty where there are no triplets."""
    paths = [module.path.removeprefix("base_model.model.") for module in triplets_of(names)]
    if not paths:
        return {}
    rank = torch.tensor(float(str(peft_config["init_r"]))) + SMALL
    return dict.fromkeys(paths, float(str(peft_config["lora_alpha"])) / float(rank))


def grouped(importance: Importance) -> Mapping[str, Tensors]:
    """Gives it by name, as it is stored; empty before the first round."""
    kinds = {SENSITIVITY: importance.sensitivity, UNCERTAINTY: importance.uncertainty}
    return {kind: tensors for kind, tensors in kinds.items() if tensors}
