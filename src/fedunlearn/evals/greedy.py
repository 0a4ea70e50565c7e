"""Greedy decoding whose finished rows leave the batch to others: what generate() gives, without running ended answers on to the longest's end."""

import inspect
from collections.abc import Callable, Generator, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# What may be set in a generation_config here: the loop below obeys these, or they do not touch the tokens.
OBEYED = frozenset(
    {
        "do_sample", "eos_token_id", "max_new_tokens", "pad_token_id", "repetition_penalty", "use_cache",
        "bos_token_id", "output_attentions", "output_hidden_states", "transformers_version", "_from_model_config",
    }
)  # fmt: skip
Ids = tuple[int, ...]
NEEDED = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})


class NotFiniteError(Exception):
    """A model's logits for a prompt hold NaN, or nothing finite. place: of that prompt."""

    def __init__(self, place: int) -> None:
        super().__init__(f"the logits of prompt {place} are not finite")
        self.place = place


def check_finite(best: torch.Tensor, places: Sequence[int]) -> None:
    """Raises NotFiniteError for the first of some prompts whose largest logit, best [B], is no finite number."""
    lost = ~torch.isfinite(best)
    if bool(lost.any()):
        raise NotFiniteError(places[int(lost.int().argmax())])


def is_plainly_greedy(inner: Any) -> bool:
    """Says whether a Decoder gives this transformer's generate(): its generation_config sets nothing else, and it keeps keys and values only.

    Otherwise (state of another kind, a forced or suppressed token, beams, a cache of its own choice) generate() itself is to be asked.
    """
    config = inner.generation_config
    if config.do_sample or not set(config.to_diff_dict()) <= OBEYED:
        return False
    if getattr(inner, "_is_stateful", True) or inner.config.is_encoder_decoder:
        return False
    layers = set(getattr(inner.config.get_text_config(), "layer_types", None) or ())
    return (
        layers <= {"full_attention", "sliding_attention"} and set(inspect.signature(inner.forward).parameters) >= NEEDED
    )


@dataclass(frozen=True)
class Decoder:
    """One greedy decoding. padded: lays prompts out as ids and mask [B, T], padded on the left, 1 where a token is seen.

    limit: new ids of a row at most. Positions are counted over seen tokens, and a repetition penalty acts on all ids of a row from its first seen one on:
    both as in generate().
    """

    inner: Any
    padded: Callable[[Sequence[Ids]], tuple[torch.Tensor, torch.Tensor]]
    ends: Set[int]
    limit: int
    penalty: float

    def run(self, prompts: Sequence[Ids], batch_size: int) -> Iterator[tuple[int, Ids]]:
        """Gives the place of a prompt and its new ids, up to and with the first that ends it, as each is done; at most batch_size at once.

        Once a quarter of the batch is free, waiting prompts take the places. Where the model keeps less than all keys (a sliding window) they wait for the last.
        """
        waiting = list(range(len(prompts)))
        running: _Running | None = None
        while waiting or running is not None:
            free = batch_size - (len(running.rows) if running else 0)
            if waiting and (running is None or (4 * free >= batch_size and running.joins)):
                rows, waiting = waiting[:free], waiting[free:]
                fresh = yield from self._next(self._start(rows, [prompts[row] for row in rows]))
                running = _joined(running, fresh) if running and fresh else running or fresh
            else:
                assert running is not None, "rows are running where none wait"
                running = yield from self._next(running)

    def _start(self, rows: list[int], prompts: Sequence[Ids]) -> "_Running":
        ids, mask = self.padded(prompts)
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        return _Running(rows, [()] * len(rows), ids, mask, positions, DynamicCache(config=self.inner.config))

    def _next(self, state: "_Running") -> Generator[tuple[int, Ids], None, "_Running | None"]:
        """One token for each row; yields the rows that end with it, and returns what is left."""
        fed = state.positions.shape[1]
        logits = (
            self.inner(
                input_ids=state.ids[:, -fed:],
                attention_mask=state.mask,
                position_ids=state.positions,
                past_key_values=state.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )  # [B, V]
        if self.penalty != 1:
            logits = _penalised(logits, state.ids, state.mask, self.penalty)
        best, chosen = logits.max(-1)
        check_finite(best, state.rows)
        found = [(*before, token) for before, token in zip(state.found, chosen.tolist(), strict=True)]
        going = [i for i, new in enumerate(found) if new[-1] not in self.ends and len(new) < self.limit]
        for i in set(range(len(found))) - set(going):
            yield state.rows[i], found[i]
        return state.grown(found, chosen[:, None]).only(going) if going else None


@dataclass(frozen=True)
class _Running:
    """Rows under way. rows: their places among the prompts; found: their new ids; ids, mask [B, T]: all ids so far.

    positions [B, S]: of the last S ids, which the model has not seen yet. cache: keys and values of the T - S before them.
    """

    rows: list[int]
    found: list[Ids]
    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    cache: DynamicCache

    @property
    def joins(self) -> bool:
        """Whether the keys and values of others can be put beside these."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def grown(self, found: list[Ids], chosen: torch.Tensor) -> "_Running":
        """The rows with one id more, chosen [B, 1]."""
        mask = torch.cat([self.mask, torch.ones_like(chosen)], 1)
        return _Running(
            self.rows, found, torch.cat([self.ids, chosen], 1), mask, self.positions[:, -1:] + 1, self.cache
        )

    def only(self, kept: list[int]) -> "_Running":
        """The rows of these places, without the columns that none of them sees; the cache is changed in place."""
        if len(kept) == len(self.rows):
            return self
        at = torch.tensor(kept, device=self.ids.device)
        self.cache.batch_select_indices(at)
        mask = self.mask[at]
        unseen = int(mask.any(0).int().argmax()) if self.joins else 0
        if unseen:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, unseen:], layer.values[:, :, unseen:]
        return _Running(
            [self.rows[i] for i in kept],
            [self.found[i] for i in kept],
            self.ids[at, unseen:],
            mask[:, unseen:],
            self.positions[at],
            self.cache,
        )


def _joined(a: _Running, b: _Running) -> _Running:
    """Both side by side, the narrower one padded on the left with what is not seen; the cache of `a` is changed in place."""
    width = max(a.ids.shape[1], b.ids.shape[1])

    def beside(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.pad(z, (width - z.shape[1], 0)) for z in (x, y)])

    def below(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.pad(z, (0, 0, width - 1 - z.shape[2], 0)) for z in (x, y)])

    for mine, other in zip(a.cache.layers, b.cache.layers, strict=True):
        mine.keys, mine.values = below(mine.keys, other.keys), below(mine.values, other.values)
    return _Running(
        a.rows + b.rows,
        a.found + b.found,
        beside(a.ids, b.ids),
        beside(a.mask, b.mask),
        torch.cat([a.positions, b.positions]),
        a.cache,
    )


def _penalised(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive logits [B, V] of ids [B, T] met before by the penalty and multiplies negative ones; ids before the first seen one do not count."""
    padding = (mask != 0).int().argmax(1)
    places = torch.arange(ids.shape[1], device=ids.device)
    spare = logits.shape[1]
    met = torch.zeros(len(logits), spare + 1, dtype=torch.bool, device=logits.device)
    met.scatter_(1, ids.masked_fill(places < padding[:, None], spare).clamp(max=spare), True)
    return torch.where(met[:, :spare], torch.where(logits < 0, logits * penalty, logits / penalty), logits)
