"""Benchmarks: each module runs with ``python -m benchmarks.<module>``; see README.md here.

What they are made of is in ``benchmarks.harness``.
"""
