"""A client's own LoRA rank and scale."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClientShape:
    """Rank r_k and lora_alpha of one client, the same in every module; its update is s_k B_k A_k with s_k = scale."""

    rank: int
    lora_alpha: float
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA."""
        return lora_scale(self.lora_alpha, self.rank, self.use_rslora)


def lora_scale(lora_alpha: float, rank: int, use_rslora: bool) -> float:
    """The factor s of s B A: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    return lora_alpha / (math.sqrt(rank) if use_rslora else rank)
