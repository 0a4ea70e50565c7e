"""Local training of one client in one round."""
