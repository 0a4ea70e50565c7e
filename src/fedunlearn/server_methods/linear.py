"""Linear combinations of adapters as products, module by module, and what becomes of them: a block beside the factors, or the best rank r."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedunlearn.aggregation.factors import Module
from fedunlearn.aggregation.product import LowRank, compressed, inner_products, squared_norm, weighted_sum

ReadProduct = Callable[[Module], LowRank]
"""An adapter (or an update) of one module as a product: s B A, float64."""


@dataclass(frozen=True, eq=False)
class Term:
    """weight times a product."""

    weight: float
    product: ReadProduct


def summed(terms: Sequence[Term], module: Module) -> LowRank:
    """Gives sum_i weight_i product_i of one module; terms of weight 0 are not read. Raises ValueError where none is left."""
    kept = [term for term in terms if term.weight]
    if not kept:
        raise ValueError(f"no term of {module.name} has a weight")
    return weighted_sum([term.weight for term in kept], [term.product(module) for term in kept])


def difference(first: ReadProduct, second: ReadProduct) -> ReadProduct:
    """Gives first - second, as a product."""
    return lambda module: weighted_sum([1.0, -1.0], [first(module), second(module)])


def block_of(terms: Sequence[Term], modules: Iterable[Module]) -> dict[str, torch.Tensor]:
    """Gives the sum as a frozen block: float32 factors of scale 1, without what is rounding; empty where every weight is 0."""
    if not any(term.weight for term in terms):
        return {}
    block: dict[str, torch.Tensor] = {}
    for module in modules:
        whole = compressed(summed(terms, module))
        block |= {module.b: whole.left.float().contiguous(), module.a: whole.right.float().contiguous()}
    return block


def gram(products: Sequence[ReadProduct], modules: Iterable[Module]) -> torch.Tensor:
    """Gives all inner products, pooled over modules, [n, n] float64."""
    total = torch.zeros(len(products), len(products), dtype=torch.float64)
    for module in modules:
        total += inner_products([product(module) for product in products])
    return total


def norms_by_module(product: ReadProduct, modules: Iterable[Module]) -> Mapping[str, float]:
    """Gives the Frobenius norm of each module's product, by module name."""
    return {module.name: squared_norm(product(module)) ** 0.5 for module in modules}
