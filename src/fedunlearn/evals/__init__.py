"""Evaluation: one scoring pass and one generation pass over TOFU, and the files their metrics are written to."""
