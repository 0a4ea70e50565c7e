"""The gauge of a product B A = (B R)(R^-1 A): which of its many factorings the server hands out. One file a gauge."""
