"""What the clients' factors of one module become: one file a reducer."""
