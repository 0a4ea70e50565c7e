"""Frozen records of a run's configuration, and the one parser that turns composed YAML into them."""
