"""What a run would take on many machines, found out on one."""
