"""TOFU's metrics: pure functions of score tables and generated texts."""
