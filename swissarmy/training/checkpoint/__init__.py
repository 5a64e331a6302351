"""Checkpoints of a run: sharded, asynchronous, complete or absent, and read back without running anything."""
