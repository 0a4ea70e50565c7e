"""TOFU as it is read, questions as token ids, and the pocket world that stands in for TOFU."""
