"""Benchmarks behind all measurements in the documentation; raw results are in `results/`."""
