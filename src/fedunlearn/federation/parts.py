"""What a task is made of, in parts named by hash: sent once to each client that may keep them, and named ever after."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import safetensors.torch
import torch
from flwr.app import ArrayRecord

from fedunlearn.aggregation.factors import cut_to
from fedunlearn.federation.block_store import BlockStore
from fedunlearn.federation.wire import pack_blob
from fedunlearn.records.adapter import A, Tensors, hash_tensors
from fedunlearn.records.shape import ClientShape


@dataclass(frozen=True, eq=False)
class Part:
    """A bundle of tensors and the hash it is named by; packed when it is first sent."""

    tensors: Tensors

    @cached_property
    def hash(self) -> str:
        """sha256 of names, dtypes, shapes and bytes."""
        return hash_tensors(self.tensors)

    @cached_property
    def packed(self) -> ArrayRecord:
        """The part as it travels."""
        return pack_blob(safetensors.torch.save(dict(self.tensors)))


@dataclass(frozen=True, eq=False)
class Block:
    """A side-car block, read from the run's folder when it is sent."""

    hash: str
    store: BlockStore

    @cached_property
    def packed(self) -> ArrayRecord:
        """The block as it travels."""
        return pack_blob(self.store.blob(self.hash))


@dataclass(frozen=True, eq=False, kw_only=True)
class Shipment:
    """All that one task is made of. start: the adapter's factors as this client gets them. reference: empty where it is not read."""

    start: Tensors
    adapter: tuple[Part, ...]
    sidecar: tuple[Block, ...]
    reference: tuple[Part, ...] = ()
    reference_sidecar: tuple[Block, ...] = ()
    keep: frozenset[str]

    def lacking(self, held: Iterable[str]) -> dict[str, Part | Block]:
        """Gives the parts that are not held, each once, by hash."""
        everything: tuple[Part | Block, ...] = (*self.adapter, *self.sidecar, *self.reference, *self.reference_sidecar)
        known = set(held)
        return {part.hash: part for part in everything if part.hash not in known}

    @property
    def apart(self) -> frozenset[str]:
        """Hashes that only the reference needs: their bytes are counted apart."""
        own: tuple[Part | Block, ...] = (*self.adapter, *self.sidecar)
        beside: tuple[Part | Block, ...] = (*self.reference, *self.reference_sidecar)
        return frozenset(part.hash for part in beside) - {part.hash for part in own}


@dataclass(frozen=True, eq=False, kw_only=True)
class Depot:
    """Makes the shipments of one round; what several clients are sent is packed once, each rank's apart.

    adapter, blocks: the global factors and the side-car's block hashes; start, start_blocks: those that the run began with.
    halves: A, and B with what is plain, are parts of their own, for a factor that rests need not be sent again. scales: s by module name.
    """

    adapter: Tensors
    blocks: tuple[str, ...]
    start: Tensors
    start_blocks: tuple[str, ...]
    store: BlockStore
    scales: Mapping[str, float]
    halves: bool
    dtype: torch.dtype
    _made: dict[tuple[bool, ClientShape | None], tuple[Part, ...]] = field(default_factory=dict)
    _read: dict[str, Block] = field(default_factory=dict)

    def shipment(self, shape: ClientShape | None, wants_reference: bool) -> Shipment:
        """Gives what a client is sent. shape: its own rank and scale, None where they are the adapter's."""
        adapter = self._parts(shape, reference=False)
        reference = self._parts(shape, reference=True) if wants_reference else ()
        sidecar = tuple(self._block(name) for name in self.blocks)
        beside = tuple(self._block(name) for name in self.start_blocks) if wants_reference else ()
        kept: tuple[Part | Block, ...] = (*sidecar, *reference, *beside, *(adapter if self.halves else ()))
        return Shipment(
            start={name: tensor for part in adapter for name, tensor in part.tensors.items()},
            adapter=adapter,
            sidecar=sidecar,
            reference=reference,
            reference_sidecar=beside,
            keep=frozenset(part.hash for part in kept),
        )

    def _block(self, name: str) -> Block:
        return self._read.setdefault(name, Block(name, self.store))

    def _parts(self, shape: ClientShape | None, *, reference: bool) -> tuple[Part, ...]:
        if (reference, shape) not in self._made:
            whole = self.start if reference else self.adapter
            fitting = whole if shape is None else cut_to(shape, whole, self.scales)
            sent = {name: tensor.to(self.dtype) for name, tensor in fitting.items()}
            groups = [[name for name in sent if name.endswith(A)], [name for name in sent if not name.endswith(A)]]
            groups = groups if self.halves else [list(sent)]
            self._made[reference, shape] = tuple(Part({name: sent[name] for name in group}) for group in groups)
        return self._made[reference, shape]
