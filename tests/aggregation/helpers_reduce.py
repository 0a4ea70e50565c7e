"""Made-up rounds for the reduction's tests, and the dense float64 way to the same numbers, written plainly."""

from dataclasses import dataclass, field, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st

from fedunlearn.aggregation.gauges.base import Gauge
from fedunlearn.aggregation.gauges.procrustes import Procrustes
from fedunlearn.aggregation.gauges.reset import Reset
from fedunlearn.aggregation.gauges.svd import Balanced, Orthonormal
from fedunlearn.aggregation.reduce import Choices, Cohort, reduce_round
from fedunlearn.aggregation.reducers.best_rank import BestRank
from fedunlearn.aggregation.reducers.factor_mean import FactorMean, PaddedFactorMean
from fedunlearn.aggregation.reducers.stack import Stack
from fedunlearn.aggregation.reducers.trimmed_mean import TrimmedMean
from fedunlearn.aggregation.robust.off import Off
from fedunlearn.records.rounds import Trained
from fedunlearn.records.shape import ClientShape

# The same examples in every run: a failure is seen by everyone or by no one.
laws = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(min_value=0, max_value=2**20)

# Float64 algebra on matrices of some 30 x 40: a few hundred roundings of 1e-16 each, and room for a mild condition number.
FLOAT64 = 1e-11
# Factors cast to float32: 2**-24 = 6e-8 an entry, in both factors; 1e-6 is what the laws promise.
FLOAT32 = 1e-6
# Reduced.error is the root of a difference of squared norms: 1e-16 of them, so 1e-8 of the norm, and a few of those.
ERROR = 1e-7

# d_out, d_in: with rank 3, four clients take the QR-core and five the dense SVD
SIZES = {"layers.0.down": (40, 26), "layers.0.q": (28, 44)}


def a_name(module):
    return f"base_model.model.{module}.lora_A.weight"


def b_name(module):
    return f"base_model.model.{module}.lora_B.weight"


@dataclass(frozen=True, eq=False)
class Made:
    """One round: what the server has and what came back."""

    adapter: dict
    scales: dict
    clients: dict  # id -> tensors
    weights: dict
    shapes: dict = field(default_factory=dict)
    trained: Trained = Trained.BOTH

    def cohort(self, **changes):
        given = {
            "adapter": self.adapter,
            "scales": self.scales,
            "weights": self.weights,
            "read": lambda client, name: self.clients[client][name],
            "round": 2,
            "seed": 0,
            "trained": self.trained,
            "shapes": self.shapes,
        }
        return Cohort(**(given | changes))

    def scale(self, client, module):
        return self.shapes[client].scale if self.shapes else self.scales[module]

    def products(self, module):
        """s_k B_k A_k of every client, dense, in id order; a factor nobody trained is the adapter's."""
        held = {client: {**self.adapter, **tensors} for client, tensors in self.clients.items()}
        return [dense(held[k], module, self.scale(k, module)) for k in sorted(self.clients)]

    def exact(self, weights=None, old_weight=0.0):
        weights = weights or tuple(self.weights[k] for k in sorted(self.weights))
        return {
            module: sum(w * p for w, p in zip(weights, self.products(module), strict=True))
            + old_weight * dense(self.adapter, module, self.scales[module])
            for module in SIZES
        }

    def old(self):
        return {module: dense(self.adapter, module, self.scales[module]) for module in SIZES}

    def updates(self, client):
        """U_k of one client, all modules in one vector."""
        index = sorted(self.clients).index(client)
        return torch.cat([(self.products(module)[index] - old).flatten() for module, old in self.old().items()])


def made(
    num_clients=3, *, rank=3, seed=0, spread=0.3, trained=Trained.BOTH, dtype=torch.float64, shapes=None, zero_b=False
):
    """Random global factors, and clients `spread` away from what they were sent; float64 adapters take no cast anywhere.

    Client ids have gaps and weights differ. shapes: client index -> ClientShape.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    scales = {module: 0.5 + i for i, module in enumerate(SIZES)}
    adapter = {}
    for module, (d_out, d_in) in SIZES.items():
        adapter[a_name(module)] = draw(rank, d_in).to(dtype)
        adapter[b_name(module)] = (draw(d_out, rank) * (0.0 if zero_b else 1.0)).to(dtype)
    ids = [3 * k + 2 for k in range(num_clients)]
    own = dict(zip(ids, shapes, strict=True)) if shapes else {}
    clients = {}
    for k in ids:
        clients[k] = {}
        for module in SIZES:
            share = (scales[module] / own[k].scale) ** 0.5 if own else 1.0
            r = own[k].rank if own else rank
            sent = {
                a_name(module): adapter[a_name(module)][:r] * share,
                b_name(module): adapter[b_name(module)][:, :r] * share,
            }
            for name, tensor in sent.items():
                moved = (tensor.double() + spread * draw(*tensor.shape)).to(dtype)
                if trained.covers(name):
                    clients[k][name] = moved
    raw = [float(x) for x in torch.rand(num_clients, generator=generator, dtype=torch.float64) + 0.1]
    weights = {k: x / sum(raw) for k, x in zip(ids, raw, strict=True)}
    return Made(adapter, scales, clients, weights, own, trained)


MIXED = (
    ClientShape(rank=1, lora_alpha=3.0),
    ClientShape(rank=4, lora_alpha=2.0),
    ClientShape(rank=2, lora_alpha=5.0, use_rslora=True),
)


def dense(tensors, module, scale):
    """Scale * B A in float64."""
    return scale * (tensors[b_name(module)].double() @ tensors[a_name(module)].double())


def stored(case, reduced):
    """The adapter that goes out: the mean cast once, tensors that nobody trained as they were."""
    return {name: reduced.mean.get(name, old).to(old.dtype) for name, old in case.adapter.items()}


def block_of(reduced, module):
    return dense(reduced.block, module, 1.0) if reduced.block else 0.0


def factors_sent(case, reduced):
    """S B A of the factors that go out, dense, by module."""
    return {module: dense(stored(case, reduced), module, case.scales[module]) for module in SIZES}


def sent(case, reduced):
    """What goes out altogether: factors and this round's block."""
    return {module: product + block_of(reduced, module) for module, product in factors_sent(case, reduced).items()}


def pooled(products):
    return float(sum((p**2).sum() for p in products.values()) ** 0.5)


def apart(ours, theirs):
    """||ours - theirs|| / ||theirs||, pooled over modules."""
    return pooled({m: ours[m] - theirs[m] for m in theirs}) / max(pooled(theirs), 1e-300)


def best(matrix, rank):
    """The best approximation of that rank, by the dense SVD."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def gap(matrix, rank):
    """(S_r - S_{r+1}) / S_1: where it is 0 the best rank-r is not unique."""
    s = torch.linalg.svdvals(matrix)
    return float((s[rank - 1] - s[rank]) / s[0]) if s[0] > 0 and rank < len(s) else 0.0


def rotation(rank, generator):
    """A random rotation (determinant 1), float64."""
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    if torch.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return q


def regauged(case, seed, rescale=True):
    """The same products in other gauges: each client's and module's B R c, R^T A / c."""
    generator = torch.Generator().manual_seed(seed)
    clients = {}
    for k, tensors in case.clients.items():
        clients[k] = dict(tensors)
        for module in SIZES:
            turn = rotation(tensors[a_name(module)].shape[0], generator)
            c = float(10 ** (2 * torch.rand(1, generator=generator) - 1)) if rescale else 1.0
            clients[k][b_name(module)] = tensors[b_name(module)] @ turn * c
            clients[k][a_name(module)] = turn.T @ tensors[a_name(module)] / c
    return replace(case, clients=clients)


@dataclass(frozen=True)
class Preset:
    """A published method as choices, and the mask and the ranks it is used with."""

    reducer: object
    gauge: object = field(default_factory=Gauge)
    trained: Trained = Trained.BOTH
    sidecar: bool = False
    feedback: bool = False

    def choices(self, robust=None, **changes):
        given = {"sidecar": self.sidecar, "feedback": self.feedback}
        return Choices(reducer=self.reducer, gauge=self.gauge, robust=robust or Off(), **(given | changes))

    def reduce(self, case, robust=None, **changes):
        return reduce_round(self.choices(robust), case.cohort(**changes))


PRESETS = {
    "fedit": Preset(FactorMean()),
    "ffa": Preset(FactorMean(), trained=Trained.B),
    "rolora_even": Preset(FactorMean(), trained=Trained.A),
    "flora": Preset(Stack(), Reset(), sidecar=True),
    "fedex": Preset(FactorMean(), sidecar=True),
    "flexlora": Preset(BestRank(), Balanced()),
    "flexlora_theirs": Preset(BestRank(), Orthonormal()),
    "flexlora_feedback": Preset(BestRank(), Balanced(), feedback=True),
    "fedsvd": Preset(FactorMean(), Orthonormal(), trained=Trained.B),
    "fedrot": Preset(FactorMean(), Procrustes(0.5)),
    "hetlora": Preset(PaddedFactorMean()),
    "trimmed": Preset(TrimmedMean(0.34), trained=Trained.B),
}
MIXING = ("flora", "flexlora", "flexlora_theirs", "flexlora_feedback", "hetlora")
NAMES = list(PRESETS)
BLOCKED = ("flora", "fedex")
BEST = ("flexlora", "flexlora_theirs", "flexlora_feedback")
EXACT = ("ffa", "rolora_even", "flora", "fedex", "fedsvd")
AVERAGED = [name for name in NAMES if name != "trimmed"]  # the trimmed mean counts every client once

# The best rank-r is unique, and as well conditioned as the tests' tolerance, where S_r stands a thousandth of S_1 above S_{r+1}.
GAP = 1e-3


def case_of(name, num_clients=3, **changes):
    return made(num_clients, trained=PRESETS[name].trained, **changes)


def has_gaps(exact, rank):
    """Whether best approximations of that rank are unique, or exact."""
    return all(torch.linalg.matrix_rank(p) <= rank or gap(p, rank) > GAP for p in exact.values())
