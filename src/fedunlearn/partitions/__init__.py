"""Who owns which rows: partitioners, one file each."""
