"""Base models, LoRA adapters on them, adapter folders."""
