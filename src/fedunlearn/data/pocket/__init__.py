"""The pocket: an invented TOFU and a base model for it, small enough for any machine (design: two minutes for a whole story)."""

from fedunlearn.data.pocket.build import PocketPaths, PocketRecipe, ensure_pocket

__all__ = ["PocketPaths", "PocketRecipe", "ensure_pocket"]
