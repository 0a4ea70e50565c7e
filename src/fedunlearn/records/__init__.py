"""Records that travel between the rooms: tensors and numbers, no behaviour beyond their own laws."""
