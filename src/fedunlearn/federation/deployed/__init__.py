"""A node of a real federation: the ClientApp that Flower starts for every message, and the worker that stays."""
