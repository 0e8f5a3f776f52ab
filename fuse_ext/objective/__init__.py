"""The closure as a function."""
