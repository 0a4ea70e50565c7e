"""Unlearning losses: one file each, pure functions of what the loop hands them."""
