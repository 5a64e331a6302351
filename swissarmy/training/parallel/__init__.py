"""Many processes, one model."""
