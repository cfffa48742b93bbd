"""Finding out what made a device that runs compiled graphs compile another one."""
