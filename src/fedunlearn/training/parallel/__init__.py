"""One client's work over several processes of one machine: the base in shards, the adapter whole on each."""
