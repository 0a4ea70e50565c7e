"""What every door does before a run: environment, command line, composition, and how faults are told."""
