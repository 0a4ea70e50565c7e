"""The bounds that every hyperparameter keeps: beyond them no run makes sense, and squares and products of numbers overflow."""

LARGEST = 1e6
"""Rates, weights, epochs, ratios and seconds are at most this."""
SMALLEST = 1e-6
"""LoRA's alphas are at least this: a factor is scaled by the root of a ratio of two of them."""
