"""When to leave Adam."""
