"""Unlearning that the server carries out: pure functions of what it remembers and what clients send."""
