"""What knows H."""
