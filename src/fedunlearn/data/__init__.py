"""TOFU and MUSE as they are read, questions and raw text as token ids, and the pocket world that stands in for TOFU."""
