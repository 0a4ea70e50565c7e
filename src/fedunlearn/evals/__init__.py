"""Evaluation: one scoring pass and one generation pass over the data sets of a benchmark, and the files their metrics are written to."""
