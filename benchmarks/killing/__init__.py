"""What chaos.py is made of: the run that is attacked, launchers and whom of theirs to kill, when, and what must be the same afterwards."""
