"""Benchmarks: every figure is a ratio (or a plain amount) measured within one run of `python -m benchmarks`."""
