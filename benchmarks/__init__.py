"""Benchmarks: each module runs with ``python -m benchmarks.<module>``; see README.md here."""
