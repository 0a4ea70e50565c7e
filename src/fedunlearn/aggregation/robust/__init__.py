"""Robust weights from inner products of the clients' product updates: one file each. With 3 to 5 clients none of them guarantees anything."""
