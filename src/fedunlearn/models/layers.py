"""What a base is made of, as far as adapters are concerned: linear layers, fused experts, routers, embeddings and the head."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
ATTENTION = ("attn", "attention")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
ROUTERS = ("gate", "router")
PIECES: Mapping[str, tuple[tuple[str, ...], ...]] = MappingProxyType(
    {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
)
"""What a fused parameter of the experts was before it was fused, in Llama's and in Mixtral's words."""
PEFT_REWRITES = frozenset({"gate", *(name for families in PIECES.values() for names in families for name in names)})
"""Ends of names that PEFT itself takes for the experts' or the router's wherever a base has fused experts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layers:
    """A base by the names of its parts. modules: all but the base itself; experts: the fused ones, parameter name -> [E, ., .].

    routers: what deals tokens to experts. head: the output layer, or None; tied: whether its weight is the embedding's.
    """

    modules: Mapping[str, nn.Module]
    experts: Mapping[str, nn.Parameter]
    routers: frozenset[str]
    head: str | None
    tied: bool

    @cached_property
    def linear(self) -> Mapping[str, nn.Module]:
        """Every layer that can have a pair: linear ones without routers and without a tied head."""
        left_out = self.routers | ({self.head} if self.tied else set())
        return {
            name: module for name, module in self.modules.items() if isinstance(module, LINEAR) and name not in left_out
        }

    @property
    def known(self) -> str:
        """What can be named, for messages."""
        said = f"linear ones are {', '.join(sorted({_leaf(name) for name in self.linear}))}"
        ends = ", ".join(sorted({end_of(name) for name in self.experts}))
        return f"{said}; fused experts are {ends}" if ends else said

    def names(self, word: str) -> bool:
        """Whether a word is the name of a linear layer or its end, or that of a part of fused experts."""
        ends = {piece for name in self.experts for family in PIECES[_leaf(name)] for piece in (*family, _leaf(name))}
        return word in ends or any(ends_in(name, word) for name in self.linear)

    def of_kind(self, kind: str) -> frozenset[str]:
        """Modules and fused experts of `attention`, `mlp` or `all-linear` (which leaves the head out); empty where none is known by that name."""
        if kind == "attention":
            return frozenset(name for name in self.linear if _under(name, ATTENTION))
        if kind == "mlp":
            return frozenset(name for name in self.linear if _under(name, FEED_FORWARD)) | set(self.experts)
        return frozenset(self.linear) - {self.head} | set(self.experts)


def layers_of(base: nn.Module) -> Layers:
    """Looks at a base without adapter, with its weights or on the meta device."""
    modules = {name: module for name, module in base.named_modules() if name}
    head, tied = _head_of(base, modules)
    return Layers(
        modules=modules,
        experts={
            f"{name}.{key}": parameter
            for name, module in modules.items()
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3 and key in PIECES
        },
        routers=frozenset(name for name in modules if _leaf(name) in ROUTERS and _beside_experts(name, modules)),
        head=head,
        tied=tied,
    )


def ends_in(path: str, name: str) -> bool:
    """Whether a module's path is a name or ends in it, whole words only: PEFT's rule for an entry of a list of modules."""
    return path == name or path.endswith(f".{name}")


def end_of(parameter: str) -> str:
    """Gives the end of a fused parameter's name that is the same in every layer: `mlp.experts.down_proj`."""
    return ".".join(parameter.split(".")[-3:])


def sides_of(module: nn.Module) -> tuple[int, int]:
    """Gives (inputs, outputs) of a linear layer, whichever way it stores its weight."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _head_of(base: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[str | None, bool]:
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    name = next((name for name, module in modules.items() if module is head), None)
    if name is None:
        return None, False
    weight = getattr(head, "weight", None)
    embeddings = [module.weight for module in modules.values() if isinstance(module, nn.Embedding)]
    return name, any(weight is other for other in embeddings)


def _beside_experts(name: str, modules: Mapping[str, nn.Module]) -> bool:
    parent = name.rpartition(".")[0]
    return f"{parent}.experts" in modules


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _under(name: str, words: tuple[str, ...]) -> bool:
    return any(word in part for part in name.split(".")[:-1] for word in words)
