"""Training: one function from a laptop to many hosts."""
