"""Fault tests that really kill, fill disks and flip bits; one module a row of the fault matrix."""
