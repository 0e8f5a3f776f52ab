"""What a user constructs."""
